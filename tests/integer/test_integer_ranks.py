"""Integer-only models that are divided among two ranks: the bits of one, also where each rank has a part of every row."""

from pathlib import Path

import pytest
import torch

from intscale_compile.kernels.integer import linear, pointwise, rows
from intscale_compile.ops import KERNEL_ABI
from tests.support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("_ranks_main.py")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
def test_two_ranks_have_the_bits_of_one(tmp_path, compiled):
    ranks = run_ranks(SCRIPT, 2, tmp_path, "cpu", compiled)
    for seen in ranks:
        assert {name: value for name, value in seen.items() if value is False} == {}
        assert len(seen) == (7 if compiled == "compiled" else 5) and seen["hash"] == ranks[0]["hash"]


@pytest.mark.parametrize("rotation", [0, 16])
def test_rows_in_two_parts(rotation):
    """What the ranks do, one after another: the largest magnitude of both, then codes of each, then the sum of products."""
    generator = torch.Generator().manual_seed(1)
    g, u = (torch.randint(-(2**20), 2**20, (5, 256), generator=generator).to(torch.int32) for _ in range(2))
    weight = torch.randint(-127, 128, (6, 256), generator=generator).to(torch.int8)
    row, ones, bias = torch.full((6,), (24 << 18) + 20000), torch.ones(6, 1, dtype=torch.uint8), torch.arange(6)
    form = (6, -1, 8, "plain", KERNEL_ABI)
    codes, scale = rows.GATE_QUANTIZE_OP(g, u, "silu", rotation)
    expected = linear.LINEAR_OP(codes, scale, weight, ones, row, bias, *form)

    halves = [
        (rows.GATE_OP(a, b, "silu"), w.contiguous()) for a, b, w in zip(*(x.chunk(2, -1) for x in (g, u, weight)))
    ]
    amax = torch.maximum(*(rows.LARGEST_OP(x, rotation) for x, _ in halves))
    parts = [rows.QUANTIZE_TO_OP(x, amax, rows.GATED, rotation) for x, _ in halves]
    assert torch.equal(torch.cat([part for part, _ in parts], -1), codes)
    assert all(torch.equal(part, scale) for _, part in parts)
    acc = sum(linear.ACCUMULATE(part, w, ones, *form) for (part, _), (_, w) in zip(parts, halves))
    assert torch.equal(linear.EPILOGUE_OP(acc, scale, row, bias), expected)
    assert torch.equal(
        rows.ACTIVATED_OP(g, "gelu").clamp(-(2**31), 2**31 - 1), pointwise.ACTIVATION_OP(g, "gelu").long()
    )
