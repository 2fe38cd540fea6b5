"""The tests of the ops see every mutation of the arithmetic inside of them: each must fail under it."""

import pytest
import torch

from intscale_compile.integer_only.widths import paper_widths
from intscale_compile.kernels.integer import arithmetic, attention, linear, pointwise, rows
from tests.integer import test_integer_ops as ops

pytestmark = pytest.mark.generated

TOKEN_SCALE, SCALED, SCORE = arithmetic.TOKEN_SCALE, linear.SCALED, attention.SCORE


def to_even(a, b):
    """Rounded quotients, with ties to even, through floating point."""
    return (a.double() / b).round().to(torch.int64)


def truncated(a, b):
    """Quotients without their fraction."""
    return torch.div(a, b, rounding_mode="trunc")


def plain_shift(a, k):
    """Shifts that do not round."""
    return a >> k if isinstance(k, int) else a >> k.clamp(1, 62)


def rough(z):
    """I-ViT's exponential: a line between the powers of two."""
    return ((1 << 15) - ((z & 65535) >> 2)) >> (z >> 16).clamp(max=40)


def short_scale(amax, bits):
    """Token scales with mantissas of 8 bits."""
    d = TOKEN_SCALE(amax, bits)
    return arithmetic.pack_dyadic(arithmetic.mantissa(d) >> 8 << 8, arithmetic.exponent(d)).to(torch.int64)


def in_float32(a, b):
    """What a ``.float()`` in an op does."""
    return (a.float() / b.float()).round().to(torch.int64)


def float_sigmoid(x):
    """The sigmoid of floating point, with 14 bits."""
    return ((x.float() / 65536).sigmoid() * 16384).round().long()


def short_rows(acc, token, row):
    """Row scales with mantissas of 8 bits."""
    return SCALED(acc, token, row - arithmetic.mantissa(row) % 256)


def float_scores(acc, key, query, k):
    """Scores whose products are rounded to 24 bits."""
    product = acc.float() * arithmetic.mantissa(key).float() * query.float()
    return arithmetic.rsh_by(product.long(), k + arithmetic.exponent(key))


def norm(features=64, center=False):
    ops.test_norm(features=features, center=center, with_beta=center)


def attend():
    ops.test_attention_of_the_cpu_is_the_aten_form(1, 6, 2, 37, 37, 64, False, True, 18)


def activate():
    ops.test_activations("silu")


MUTATIONS = {
    "codes: ties to even": (arithmetic, "divide_rows", to_even, lambda: ops.test_quantize(8)),
    "codes: truncated": (arithmetic, "divide_rows", truncated, lambda: ops.test_quantize(8)),
    "codes: float32": (arithmetic, "divide_rows", in_float32, lambda: ops.test_quantize(8)),
    "codes: scale of 8 bits": (arithmetic, "TOKEN_SCALE", short_scale, lambda: ops.test_quantize(8)),
    "norm: truncated": (rows, "long_quotient", truncated, norm),
    "norm: float32": (rows, "long_quotient", in_float32, lambda: norm(1500)),
    "norm: float32 root": (rows, "isqrt", lambda a: a.float().sqrt().to(torch.int64), lambda: norm(1500)),
    "norm: mean without its fraction": (rows, "row_rdiv", lambda a, b: a // b >> 8 << 8, lambda: norm(1500, center=True)),
    "linear: scaled in float32": (linear, "SCALED", lambda acc, *d: (SCALED(acc, *d).float() * 1.0).long(), ops.test_linear),
    "linear: row scale of 8 bits": (linear, "SCALED", short_rows, ops.test_linear),
    "linear: wraps": (linear, "saturate", lambda y: y.to(torch.int32) + 1, ops.test_linear),
    "rope: shift without rounding": (pointwise, "rsh", plain_shift, ops.test_rope_and_addition_and_embedding),
    "embedding: shift without rounding": (pointwise, "rsh_by", plain_shift, ops.test_rope_and_addition_and_embedding),
    "addition: wraps": (pointwise, "saturate", lambda a: a.to(torch.int32), ops.test_rope_and_addition_and_embedding),
    "gate: shift without rounding": (rows, "rsh", plain_shift, activate),
    "gate: float32 sigmoid": (pointwise, "sigmoid", float_sigmoid, activate),
    "attention: rough exponential": (attention, "exp2neg", rough, attend),
    "attention: truncated": (attention, "divide_rows", truncated, attend),
    "attention: values without rounding": (attention, "rsh_by", plain_shift, attend),
    "attention: result without rounding": (attention, "rsh", plain_shift, attend),
    "attention: scores in float32": (attention, "SCORE", float_scores, attend),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_turns_a_test_red(name, monkeypatch):
    module, attribute, mutant, test = MUTATIONS[name]
    test()
    monkeypatch.setattr(module, attribute, mutant)
    with pytest.raises(AssertionError):
        test()


def test_widths_of_the_paper_end_with_their_context():
    parts = [part for seed in range(3) for part in rows.QUANTIZE_OP(ops.q16(1, 2, 9, 8, seed=seed))]
    arguments = (*parts, None, True)
    x = ops.q16(4, 40)
    run = lambda: (attention.ATTENTION_OP(*arguments, 20000, 16), rows.GATE_QUANTIZE_OP(x, x, "silu")[0])  # noqa: E731
    expected = run()
    with paper_widths():
        narrow = run()
    assert all(not torch.equal(a, b) for a, b in zip(narrow, expected))
    assert all(torch.equal(a, b) for a, b in zip(run(), expected))
