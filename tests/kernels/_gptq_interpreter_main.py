"""Run GPTQ's inner kernel in Triton's interpreter; prints ``{"case": ..., "error": null | text}``, one line per case."""

from __future__ import annotations

import itertools
import sys

from tests.support.interpreter import interpret, run_cases

interpret()

import torch  # noqa: E402

from intscale_compile.calibration.gptq import round_block  # noqa: E402
from intscale_compile.kernels.gptq_block import round_block_gpu  # noqa: E402
from intscale_compile.kernels.triton_scale_search import search_integer_scales_gpu  # noqa: E402
from intscale_compile.tensors.scale_search import PLAIN_STEP, ROW_FRACTIONS, search_integer_scales  # noqa: E402


def check_block(batch: int, n: int, columns: int, code_range: tuple[int, int], sliced: bool) -> None:
    """Codes and errors are those of the PyTorch loop: all numbers are multiples of 2**-8, so that every sum is exact."""
    torch.manual_seed(n)
    width = columns + 3 if sliced else columns
    grid = torch.randint(-2048, 2048, (2, batch, n, width)).float() / 256
    target, reference = grid[..., :columns]
    steps = 2.0 ** torch.randint(-2, 1, (batch, n, width)).float()[..., :columns]
    rows = torch.randint(-2, 3, (batch, columns, columns)).float() / 4
    codes, errors = round_block_gpu(target, reference, steps, rows, code_range)
    wanted_codes, wanted_errors = round_block(target, reference, steps, rows, code_range)
    assert torch.equal(codes, wanted_codes), f"{int((codes != wanted_codes).sum())} codes differ"
    assert torch.equal(errors, wanted_errors), "errors differ"


def check_weighted_search(groups: int, size: int) -> None:
    """The weighted search of integer scales finds what the PyTorch search finds."""
    torch.manual_seed(groups)
    weight = torch.randn(2, groups, size)
    weight /= weight.abs().amax((1, 2), keepdim=True)
    counts = torch.rand(groups, size) ** 4 + 1e-3
    steps, scales = search_integer_scales_gpu(weight, 15, ROW_FRACTIONS, PLAIN_STEP, counts)
    wanted_steps, wanted_scales = search_integer_scales(weight, 15, counts)
    plain_steps, plain_scales = search_integer_scales(weight, 15)
    torch.testing.assert_close(steps, wanted_steps, rtol=1e-6, atol=0)
    assert torch.equal(scales, wanted_scales), "scales differ"
    assert not (torch.equal(steps, plain_steps) and torch.equal(scales, plain_scales)), "weights changed nothing"


def all_cases():
    """Every case with its name."""
    shapes = ((2, 17, 20), (1, 16, 7), (3, 1, 33))
    several = itertools.product(shapes, ((-8, 7), (-127, 127)), (False, True))
    for (batch, n, columns), codes, sliced in [*several, ((1, 5, 128), (-8, 7), True)]:
        name = f"block-{batch}x{n}x{columns}-{codes[1]}-{'sliced' if sliced else 'whole'}"
        yield name, lambda b=batch, n=n, c=columns, r=codes, s=sliced: check_block(b, n, c, r, s)
    for groups, size in ((3, 128), (5, 32)):
        yield f"search-{groups}x{size}", lambda g=groups, s=size: check_weighted_search(g, s)


if __name__ == "__main__":
    sys.exit(run_cases(all_cases(), "block-2x17x20-|block-.*-7-sliced|search-3"))
