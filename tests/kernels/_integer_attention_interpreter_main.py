"""Run the integer attention kernel in Triton's interpreter; prints ``{"case": ..., "error": null | text}``, one line per case."""

from __future__ import annotations

import sys

from tests.support.interpreter import interpret, run_cases

interpret()

import torch  # noqa: E402

from intscale_compile.kernels.integer import arithmetic, attention, rows, triton_attention  # noqa: E402

# batch, query heads, key heads, tokens, keys, features, masked, causal, bits of the activations
CASES = {
    "prefill": (1, 4, 2, 40, 40, 64, False, True, 18),
    "decode": (2, 6, 2, 1, 150, 32, False, False, 19),
    "masked": (2, 2, 1, 21, 70, 33, True, False, 18),
    "ends": (1, 2, 2, 9, 40, 16, False, False, 31),
    "masked-causal": (1, 3, 3, 67, 67, 128, True, True, 24),
    "divided": (2, 4, 2, 1, 150, 32, True, False, 19),
    "divided-causal": (1, 3, 1, 3, 130, 64, False, True, 18),
    "small": (1, 1, 1, 3, 3, 8, False, True, 4),
}
QUICK = "masked$|divided$"


def check(batch, heads, shared, tokens, keys, features, masked, causal, bits) -> None:
    generator = torch.Generator().manual_seed(bits)
    draw = lambda *shape: torch.randint(-(2**bits), 2**bits, shape, generator=generator).to(torch.int32)  # noqa: E731
    q = rows.QUANTIZE_OP(draw(batch, tokens, heads, features).transpose(1, 2))
    k = rows.QUANTIZE_OP(draw(batch, shared, keys, features))
    v = rows.QUANTIZE_OP(draw(batch, keys, shared, features).transpose(1, 2))
    mask = torch.rand(batch, 1, tokens, keys, generator=generator) < 0.4 if masked else None
    if masked:
        mask[0, 0, 0] = False  # sees nothing
    arguments = (*q, *k, *v, mask, causal, *arithmetic.dyadic_number(1.44 / 8))
    found, expected = triton_attention.attention_gpu(*arguments), attention.attention_aten(*arguments)
    assert torch.equal(found, expected), (found - expected).abs().amax()


def main() -> int:
    return run_cases([(name, lambda case=case: check(*case)) for name, case in CASES.items()], QUICK)


if __name__ == "__main__":
    sys.exit(main())
