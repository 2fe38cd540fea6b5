"""Run the Triton kernels in Triton's interpreter; prints ``{"case": ..., "error": null | text}``, one line per case.

A process of its own, because ``TRITON_INTERPRET`` is read when triton is imported.
"""

from __future__ import annotations

import itertools
import sys

from tests.support.interpreter import interpret, run_cases, thorough

interpret()

import torch  # noqa: E402

from intscale_compile.kernels.quantize_per_token import SMALLEST_AMAX, quantize_per_token_aten  # noqa: E402
from intscale_compile.kernels.tile import Tile  # noqa: E402
from intscale_compile.kernels.triton_gemm import accumulate_cuda, linear_cuda  # noqa: E402
from intscale_compile.kernels.triton_quantize import quantize_per_token_cuda  # noqa: E402
from tests.support.weights import make_problem  # noqa: E402

SMALL, TALL, WIDE = Tile(16, 64), Tile(64, 32), Tile(32, 128, group_n=1)
LOW = Tile(32, 64)  # up to 16 tokens groups are summed by words
GROUP_SIZES = (32, 64, 128, 256, -1)
PLAIN = (32, -1)  # with zero points; how a packing is read depends little on the size of a group
QUICK = (
    "g(32|128|-1)-s.-tiled-random|g(64|256)-s4-tiled-random|g(32|-1)-s4-plain-random|g(128|-1)-s.-tiled-e"
    "xtreme|g(128|-1)-int16|zero-g(128|-1)-s.-tiled-extreme|zero-g(32|128)-s[48]-tiled-random|zero-g32-s4"
    "-plain|w8a8-.*-random|w8a8-tiled|shape.*-16x64|shape.*129.*-32|deep-|chosen|shapes$|nan|quantize|split-(g"
    "(32|64)-s4.*640|g128-s4-tiled-2|g256-s8|offsets|w8a8|more|one)"
)  # see tests/support/interpreter.py


def cases():
    """Name, problem arguments and tile of every case; ragged in M, N and K unless the name says otherwise."""
    for group_size, scale_bits, packing in itertools.product(GROUP_SIZES, (4, 8), ("plain", "tiled")):
        for values in ("random", "extreme"):
            tile = TALL if values == "random" else LOW
            shape = (19, 77, 296) if values == "random" else (3, 65, 512)
            arguments = dict(group_size=group_size, scale_bits=scale_bits, packing=packing, values=values)
            yield f"g{group_size}-s{scale_bits}-{packing}-{values}", shape, arguments, tile
    # Zero points: 3 bits fold, 4 and 8 do not.
    for group_size, scale_bits, packing in itertools.product(GROUP_SIZES, (3, 4, 8), ("plain", "tiled")):
        if packing == "plain" and group_size not in PLAIN:
            continue
        for values in ("random", "extreme") if packing == "tiled" else ("extreme",):
            tile, shape = (TALL, (19, 77, 296)) if values == "random" else (SMALL, (3, 65, 512))
            arguments = dict(group_size=group_size, scale_bits=scale_bits, packing=packing, values=values)
            yield f"zero-g{group_size}-s{scale_bits}-{packing}-{values}", shape, arguments | {"asymmetric": True}, tile
    for group_size, packing in ((32, "plain"), (32, "tiled"), (128, "tiled"), (256, "plain")):
        arguments = dict(group_size=group_size, scale_bits=8, packing=packing, offsets=True)
        for values, tile, shape in (("random", TALL, (19, 77, 296)), ("extreme", SMALL, (3, 65, 512))):
            yield f"offset-g{group_size}-{packing}-{values}", shape, arguments | {"values": values}, tile
    for packing, values in itertools.product(("plain", "tiled"), ("random", "extreme")):
        arguments = dict(group_size=-1, scale_bits=1, packing=packing, values=values, weight_bits=8)
        yield f"w8a8-{packing}-{values}", (17, 70, 300), arguments, WIDE
    for group_size in GROUP_SIZES:
        arguments = dict(group_size=group_size, scale_bits=11, scale_dtype=torch.int16)
        yield f"g{group_size}-int16-scales", (5, 40, 520), arguments, WIDE
    for shape in ((1, 1, 1), (1, 1, 31), (2, 129, 127), (33, 64, 129), (1, 200, 256)):
        for tile in (SMALL, WIDE):
            yield f"shape{shape}-{tile.block_m}x{tile.block_n}", shape, dict(group_size=128, packing="tiled"), tile
    # Too deep for codes kept 16 times too large: the per-channel kernel must notice.
    yield "deep-per-channel", (2, 16, 131072 + 64), dict(group_size=-1, scale_bits=1, values="extreme"), SMALL
    yield "deepest-times16", (2, 32, 131072 - 128), dict(group_size=-1, scale_bits=1, values="extreme"), SMALL
    # Parts of K in different programs: by words of four groups, of two and of one, and by the loop of any format.
    parts, words = Tile(16, 64, split_k=3), ((32, 640), (64, 640), (64, 1024), (64, 576), (128, 1280), (128, 2048))
    for group_size, k in (*words, (256, 1024), (-1, 640), (128, 1100)):
        for scale_bits, packing in ((4, "tiled"), (8, "plain")):
            arguments = dict(group_size=group_size, scale_bits=scale_bits, packing=packing, values="extreme")
            yield f"split-g{group_size}-s{scale_bits}-{packing}-{k}", (19, 77, k), arguments, parts
    for name, scale_bits in (("asymmetric", 3), ("asymmetric", 8), ("offsets", 8)):
        arguments = dict(group_size=32, scale_bits=scale_bits, packing="tiled", values="extreme") | {name: True}
        yield f"split-{name}-s{scale_bits}", (3, 65, 520), arguments, parts
    yield "split-w8a8", (17, 70, 600), dict(group_size=-1, scale_bits=1, packing="tiled", weight_bits=8), parts
    yield "split-one-part-by-words", (5, 65, 1024), dict(group_size=128, packing="tiled"), Tile(16, 64)
    yield "split-more-parts-than-steps", (3, 65, 256), dict(group_size=128, packing="tiled"), Tile(16, 64, split_k=8)
    yield "chosen-tile", (7, 96, 384), dict(group_size=128, packing="tiled"), None


def check(shape, arguments, tile) -> None:
    """Compare accumulator and linear output of one case with the reference."""
    problem = make_problem(*shape, **arguments)
    weight = (problem.qdata, problem.scale)
    acc = accumulate_cuda(problem.xq, *weight, *problem.weight_args, tile=tile, zero_point=problem.zero_point)
    assert acc.dtype == torch.int32 and torch.equal(acc.long(), problem.accumulator), "accumulator differs"
    operands = (problem.xq, problem.token_scale, problem.qdata, problem.scale, problem.row_scale)
    if arguments.get("values") == "extreme":
        return  # the scales are the same code for every accumulator
    for bias in (None, problem.bias) if thorough() or tile is not TALL else (problem.bias,):
        form = (*problem.weight_args, torch.float32)
        y = linear_cuda(*operands, bias, *form, tile=tile, zero_point=problem.zero_point)
        expected = problem.linear(bias is not None)
        torch.testing.assert_close(y, expected, rtol=2.0**-22, atol=2.0**-22 if bias is not None else 0)


def check_shapes() -> None:
    """Any number of leading dimensions, none of them, no rows at all, and rows not adjacent in memory."""
    problem = make_problem(12, 70, 200, 64, packing="tiled")
    operands = (problem.qdata, problem.scale, *problem.weight_args)
    expected = problem.accumulator.to(torch.int32)
    assert torch.equal(accumulate_cuda(problem.xq.view(3, 2, 2, 200), *operands), expected.view(3, 2, 2, 70))
    assert torch.equal(accumulate_cuda(problem.xq[4], *operands), expected[4])
    assert torch.equal(accumulate_cuda(problem.xq[::3], *operands), expected[::3])
    assert torch.equal(accumulate_cuda(problem.xq.t().contiguous().t(), *operands), expected)
    assert accumulate_cuda(problem.xq[:0], *operands).shape == (0, 70)
    bias = problem.bias.to(torch.bfloat16)
    y = linear_cuda(
        problem.xq.view(3, 4, 200), problem.token_scale.view(3, 4, 1), problem.qdata, problem.scale, problem.row_scale,
        bias, *problem.weight_args, torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(y.view(12, 70), problem.linear(False) + bias.float(), rtol=2.0**-22, atol=2.0**-22)


def check_not_a_number() -> None:
    """A NaN token scale spoils its own row only."""
    problem = make_problem(5, 33, 128, 128)
    token_scale = problem.token_scale.clone()
    token_scale[2] = float("nan")
    weight = (problem.qdata, problem.scale, problem.row_scale)
    y = linear_cuda(problem.xq, token_scale, *weight, None, *problem.weight_args, torch.float32)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], problem.linear(False)[[0, 1, 3, 4]])


def check_quantize() -> None:
    """The eager quantizer has the bits of the reference: ties, zeros, any shape; a row that is not finite spoils itself."""
    ties = torch.arange(-254, 255)[None] / 2
    for x in (torch.randn(5, 100) * 3, torch.randn(2, 3, 1024).half(), torch.randn(7, 17).bfloat16(), ties, ties * 0):
        for ours, reference in zip(quantize_per_token_cuda(x, SMALLEST_AMAX), quantize_per_token_aten(x)):
            assert torch.equal(ours, reference), x.shape
    x = torch.randn(4, 64)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    (xq, scale), (expected, _) = quantize_per_token_cuda(x, SMALLEST_AMAX), quantize_per_token_aten(x)
    assert scale[1:3].isnan().all() and not scale[[0, 3]].isnan().any() and torch.equal(xq[[0, 3]], expected[[0, 3]])


def main() -> int:
    checks = [(name, lambda a=arguments: check(*a)) for name, *arguments in cases()]
    return run_cases(
        [*checks, ("shapes", check_shapes), ("nan", check_not_a_number), ("quantize", check_quantize)], QUICK
    )


if __name__ == "__main__":
    sys.exit(main())
