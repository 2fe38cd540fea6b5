"""``prove``: what it says of a model, and that each of its parts finds what is planted for it."""

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, integer_only
from intscale_compile.errors import IntegerOnlyError
from intscale_compile.integer_only import proof as proving
from intscale_compile.kernels.integer import arithmetic, pointwise, scalar
from intscale_compile.kernels.integer.define import DECOMPOSITIONS


class Block(torch.nn.Module):
    """An embedding and a residual block."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(50, 128), torch.nn.Linear(128, 128)
        self.norm = torch.nn.RMSNorm(128)

    def forward(self, ids):
        x = self.table(ids)
        return x + self.linear(self.norm(x))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    model = Block().eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    return model


IDS = torch.arange(12).view(2, 6)


def refusal(model):
    with pytest.raises(IntegerOnlyError) as caught:
        integer_only.prove(model, IDS)
    return str(caught.value)


def test_a_model_is_proved(block):
    proof = integer_only.prove(block, IDS)
    assert proof.holds and proof.kernels >= 2
    assert proof.ops == {
        "int_embedding": 1, "int_norm_quantize": 1, "int_linear": 1, "int_add": 1, "int_to_float": 1,
    }  # fmt: skip
    by_value = {(bound.op, bound.value): bound for bound in proof.bounds}
    weight = block.linear.weight
    assert 2 ** by_value["int_linear", "accumulator"].bits == pytest.approx(int(weight.accumulator_bound().max()))
    assert "no floating point but the last conversion" in str(proof) and "acc * m * m" in str(proof)


def plant(monkeypatch, planted, op=pointwise.ADD_OP):
    """Let an op be ``planted`` in Inductor."""
    from torch._inductor.decomposition import decompositions

    from intscale_compile.ops import register_inductor

    register_inductor()
    monkeypatch.setitem(DECOMPOSITIONS, op, planted)
    monkeypatch.setitem(decompositions, op, planted)
    from intscale_compile.integrations.torch import decompositions_anew

    decompositions_anew()


def test_a_planted_float_is_found_by_type_and_in_the_code(block, monkeypatch):
    plant(monkeypatch, lambda a, b: arithmetic.saturate((a.to(torch.float64) + b).to(torch.int64)))
    text = refusal(block)
    assert "floating point node: " in text and "floating point code: " in text


def test_a_planted_overflow_is_found(block, monkeypatch):
    monkeypatch.setattr(type(block.linear.weight), "accumulator_bound", lambda self: torch.tensor([2**40]))
    assert "OVERFLOWS" in refusal(block)


def test_a_planted_function_in_code_is_found():
    conversion = "auto a = at::vec::convert<float>(t);\n auto b = static_cast<float>(1.52587890625e-05);"
    good = f"extern void k(const int32_t* in, float* out) {{\n {conversion}\n}}"
    assert proving.float_lines(good) == []
    assert proving.float_lines(good.replace("1.52587890625e-05", "0.5"))
    assert proving.float_lines(good + "\n auto c = std::exp(b);")
    assert proving.float_lines("auto x = at::vec::VecMask<float,1>::from(t);") == []
    assert proving.float_lines("tmp = tl_math.exp(x)") and proving.float_lines("double y = 1;")


MUTATIONS = {
    "ties to even": ("RDIV", lambda a, b: (a.double() / b).round().to(torch.int64)),
    "no rounding": ("RSH", lambda a, k: a >> k.clamp(1, 62)),
    "truncated quotient": ("RDIV", lambda a, b: torch.div(a, b, rounding_mode="trunc")),
    "rough exponential": ("EXP2NEG", lambda z: ((1 << 15) - ((z & 65535) >> 2)) >> (z >> 16).clamp(max=40)),
    "scale of 8 bits": ("TOKEN_SCALE", lambda amax, f: scalar.TOKEN_SCALE(amax, f) >> 8 << 8),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_arithmetic_changes_bits(name):
    """What the oracle of test_integer_ops would see: each mutation gives other numbers on ordinary values."""
    function, mutant = MUTATIONS[name]
    op, values = getattr(scalar, function), torch.arange(1, 4000)
    arguments = {1: (values * 37,), 2: (values * 37, torch.tensor([12]))}[len(op._schema.arguments)]
    assert not torch.equal(op(*arguments), mutant(*arguments))
