"""Run the grouped kernel in Triton's interpreter; prints ``{"case": ..., "error": null | text}``, one line per case.

A process of its own, because ``TRITON_INTERPRET`` is read when triton is imported.
"""

from __future__ import annotations

import itertools
import sys

from tests.support.interpreter import interpret, run_cases

interpret()

import torch  # noqa: E402

from intscale_compile.kernels.tile import Tile  # noqa: E402
from intscale_compile.kernels.triton_grouped import grouped_accumulate_cuda, grouped_linear_cuda  # noqa: E402
from tests.support.experts import ROUTINGS, make_grouped  # noqa: E402

SMALL, TALL, ONE_COLUMN = Tile(16, 64), Tile(64, 32), Tile(32, 128, group_n=1)
GROUP_SIZES = (32, 64, 128, 256, -1)
PLAIN = (32, -1)  # how a packing is read depends little on the size of a group
TELLING = ("ragged", "last-empty", "no-expert")
QUICK = (
    "g(32|128|-1)-s.-tiled$|g(64|256)-s4-tiled$|g(32|-1)-s4-plain$|g(128|-1)-s.-tiled-extreme|zero-g(32-p"
    "lain|128-tiled)|w8a8-.*-random|w8a8-tiled|routing-(last-empty|no-expert|single)-16x64|routing-ragged"
    "-(64x32|chosen)|index-True-True-(ragged|last-empty)|int16|many|bad"
)  # see tests/support/interpreter.py


def cases():
    """Name, routing, N and K, options and tile of every case; ragged in rows, N and K."""
    for group_size, scale_bits, packing in itertools.product(GROUP_SIZES, (4, 8), ("plain", "tiled")):
        if packing == "plain" and group_size not in PLAIN:
            continue
        options = dict(group_size=group_size, scale_bits=scale_bits, packing=packing)
        yield f"g{group_size}-s{scale_bits}-{packing}", "small", (77, 296), options, SMALL
        if packing == "tiled":  # the codes of a tile are the same in both
            yield f"g{group_size}-s{scale_bits}-{packing}-extreme", "last-empty", (65, 512), options | EXTREME, TALL
    for group_size, packing in itertools.product((32, 128, -1), ("plain", "tiled")):
        options = dict(group_size=group_size, scale_bits=8, packing=packing, asymmetric=True)
        yield f"zero-g{group_size}-{packing}", "last-empty", (77, 296), options, SMALL
    for packing, values in itertools.product(("plain", "tiled"), ("random", "extreme")):
        options = dict(group_size=-1, scale_bits=1, packing=packing, values=values, weight_bits=8)
        yield f"w8a8-{packing}-{values}", "small", (70, 300), options, ONE_COLUMN
    for routing, tile in itertools.product(ROUTINGS, (SMALL, TALL, None)):
        if tile is not SMALL and routing not in TELLING:
            continue
        size = "chosen" if tile is None else f"{tile.block_m}x{tile.block_n}"
        yield f"routing-{routing}-{size}", routing, (129, 128), dict(packing="tiled"), tile
    for gather, scatter in ((True, False), (False, True), (True, True)):
        options = dict(packing="tiled", gather=gather, scatter=scatter)
        for routing in ROUTINGS if gather and scatter else TELLING:
            yield f"index-{gather}-{scatter}-{routing}", routing, (66, 200), options, SMALL
    options = dict(group_size=128, scale_bits=11, scale_dtype=torch.int16, packing="tiled")
    yield "int16-scales", "small", (40, 520), options, SMALL


EXTREME = dict(values="extreme")


def check(routing, shape, options, tile) -> None:
    """Compare accumulator and linear output of one case with the reference."""
    p = make_grouped(*ROUTINGS[routing], *shape, **options)
    own = dict(tile=tile, zero_point=p.zero_point)
    acc = grouped_accumulate_cuda(p.xq, p.qdata, p.scale, p.offsets, p.form, *p.indices, **own)
    assert acc.dtype == torch.int32 and torch.equal(acc.long(), p.accumulator), "accumulator differs"
    if routing == "small" or "values" in options:
        return  # the scales are the same code for every accumulator
    weight = (p.xq, p.token_scale, p.qdata, p.scale, p.row_scale)
    y = grouped_linear_cuda(*weight, None, p.offsets, p.form, torch.float32, *p.indices, **own)
    torch.testing.assert_close(y, p.expected, rtol=2.0**-22, atol=0)
    with_bias = grouped_linear_cuda(*weight, p.bias, p.offsets.long(), p.form, torch.float32, *p.indices, **own)
    difference = with_bias - y if p.out_index is None else (with_bias - y)[p.out_index.long()]
    last = 0
    for expert, end in enumerate(p.offsets.tolist()):
        torch.testing.assert_close(difference[last:end], p.bias[expert].expand(end - last, -1), rtol=0.05, atol=0.05)
        last = end
    assert not difference[last:].any(), "rows of no expert have a bias"


def check_many_experts() -> None:
    """128 experts, most of them without rows."""
    counts = tuple(int(e % 11 == 0) * (e % 5 + 1) for e in range(128))
    p = make_grouped(counts, 2, 32, 64, group_size=64, packing="tiled", gather=True)
    acc = grouped_accumulate_cuda(p.xq, p.qdata, p.scale, p.offsets, p.form, *p.indices)
    assert torch.equal(acc.long(), p.accumulator)


def check_bad_offsets() -> None:
    """Offsets beyond the rows, or falling, never reach memory that is not ours."""
    p = make_grouped((4, 4, 4), 0, 32, 128)
    for offsets in ([4, 50, 90], [8, 2, 12], [-3, 5, 12]):
        grouped_accumulate_cuda(p.xq, p.qdata, p.scale, torch.tensor(offsets, dtype=torch.int32), p.form)


def main() -> int:
    checks = [(name, lambda a=arguments: check(*a)) for name, *arguments in cases()]
    return run_cases([*checks, ("many-experts", check_many_experts), ("bad-offsets", check_bad_offsets)], QUICK)


if __name__ == "__main__":
    sys.exit(main())
