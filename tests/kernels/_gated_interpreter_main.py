"""Run the gated kernel in Triton's interpreter; prints ``{"case": ..., "error": null | text}``, one line per case.

A process of its own, because ``TRITON_INTERPRET`` is read when triton is imported.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys

from tests.support.interpreter import interpret, run_cases, thorough

interpret()

import torch  # noqa: E402

from intscale_compile.kernels.tile import Tile  # noqa: E402
from intscale_compile.kernels.triton_gated import gated_linear_cuda  # noqa: E402
from intscale_compile.kernels.w4a8_gated import ACTIVATIONS, gate  # noqa: E402
from tests.support.weights import Problem, make_problem  # noqa: E402

SMALL, TALL, WIDE = Tile(16, 64), Tile(64, 32), Tile(32, 128, group_n=1)
GROUP_SIZES = (32, 64, 128, 256, -1)
PLAIN = (32, -1)  # the rest of how a packing is read is tested with the linear
QUICK = (
    "group(32|128|-1)-s.-tiled|group(64|256)-s4-tiled|group32-s4-plain|silu-|gelu.*-(chosen|64x32)|w8a8|z"
    "ero-g(32-plain|128-tiled|-1-tiled)|int16|one|exact|shapes"
)  # see tests/support/interpreter.py


def cases():
    """Name, problem arguments, activation and tile of every case; ragged in M, I and K unless the name says otherwise."""
    for group_size, scale_bits, packing in itertools.product(GROUP_SIZES, (4, 8), ("plain", "tiled")):
        if packing == "plain" and group_size not in PLAIN:
            continue
        arguments = dict(group_size=group_size, scale_bits=scale_bits, packing=packing)
        yield f"group{group_size}-s{scale_bits}-{packing}", (19, 2 * 77, 296), arguments, "silu", TALL
    for activation, tile in itertools.product(ACTIVATIONS, (SMALL, TALL, WIDE, None)):
        size = "chosen" if tile is None else f"{tile.block_m}x{tile.block_n}"
        arguments = dict(group_size=128, packing="tiled")
        yield f"{activation}-{size}", (33, 2 * 128, 256), arguments, activation, tile
    for packing in ("plain", "tiled"):
        arguments = dict(group_size=-1, scale_bits=1, packing=packing, weight_bits=8)
        yield f"w8a8-{packing}", (17, 2 * 35, 300), arguments, "silu", WIDE
    for group_size, packing in itertools.product((32, 128, -1), ("plain", "tiled")):
        arguments = dict(group_size=group_size, scale_bits=8, packing=packing, asymmetric=True)
        yield f"zero-g{group_size}-{packing}", (19, 2 * 77, 296), arguments, "silu", TALL
    yield "int16-scales", (5, 40, 520), dict(group_size=128, scale_bits=11, scale_dtype=torch.int16), "silu", WIDE
    yield "one-output", (1, 2, 31), dict(group_size=128, packing="tiled"), "silu", SMALL


def call(p: Problem, activation: str, bias, tile, dtype=torch.float32) -> torch.Tensor:
    operands = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale, bias, activation, *p.weight_args, dtype)
    return gated_linear_cuda(*operands, tile=tile, zero_point=p.zero_point)


def check(shape, arguments, activation, tile) -> None:
    """Compare with the activation of the exact accumulator; ``1 + erf(x)`` cancels, which leaves an absolute error."""
    p = make_problem(*shape, **arguments)
    p.token_scale.mul_(0.1)
    for bias in (None, p.bias) if thorough() or tile is SMALL else (p.bias,):
        y = call(p, activation, bias, tile)
        torch.testing.assert_close(y, gate(p.linear(bias is not None), activation), rtol=2.0**-19, atol=2.0**-17)


def check_exact() -> None:
    """Up rows to the bit: gate rows of zero scale with a bias of 64 make ``silu(gate)`` exactly 64."""
    p = make_problem(19, 2 * 70, 296, 128, packing="tiled")
    features = 70
    row_scale, bias = torch.ones_like(p.row_scale), torch.zeros_like(p.bias)
    row_scale[:features], bias[:features] = 0.0, 64.0
    ones = dataclasses.replace(p, token_scale=torch.ones_like(p.token_scale), row_scale=row_scale)
    y = call(ones, "silu", bias, SMALL)
    assert torch.equal(y.double(), 64.0 * p.accumulator[:, features:].float().double())


def check_shapes() -> None:
    """Any number of leading dimensions, no rows at all, rows not adjacent in memory."""
    p = make_problem(12, 2 * 70, 200, 64, packing="tiled")
    expected = call(p, "silu", None, None)
    weight = (p.qdata, p.scale, p.row_scale, None, "silu", *p.weight_args, torch.float32)
    y = gated_linear_cuda(p.xq.view(3, 4, 200), p.token_scale.view(3, 4, 1), *weight)
    assert torch.equal(y, expected.view(3, 4, 70))
    assert torch.equal(gated_linear_cuda(p.xq[::3], p.token_scale[::3], *weight), expected[::3])
    assert gated_linear_cuda(p.xq[:0], p.token_scale[:0], *weight).shape == (0, 70)


def main() -> int:
    checks = [(name, lambda a=arguments: check(*a)) for name, *arguments in cases()]
    return run_cases([*checks, ("exact", check_exact), ("shapes", check_shapes)], QUICK)


if __name__ == "__main__":
    sys.exit(main())
