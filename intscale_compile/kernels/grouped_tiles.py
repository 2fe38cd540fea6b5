"""Tile shapes of the grouped kernels (mixtures of experts), chosen from the problem size by rules.

The rules start from those of the plain kernel (``tiles``), which were measured. What is different here: rows are spread over
experts, so a tile is as tall as the rows of *one* expert, and how many experts have rows is not known on the host.

Swept on an H100 with the experts of Mixtral-8x7B and Qwen3-30B-A3B, 1 to 2048 tokens (``benchmarks/grouped.py --sweep``, with
``--gluon`` for the Gluon kernels). ``tile=`` of the launchers overrides the choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Optional

from .gluon_tiles import deepest, illegal
from .tile import SM_COUNT, Tile, schedule_name, tile_count

MANY_ROWS = 32  # of an expert, from which on the Gluon kernel is the faster one for every weight
FEW_ROWS = 8  # of an expert, up to which its weight is read once and little else matters
LARGE_WEIGHT = 1 << 24  # elements of one expert's weight, from which on it is the faster one for fewer rows too
DEEP = 4096  # input features from which on splitting K pays where there are few tiles


def choose_grouped_tile(
    rows: int,
    experts: int,
    n: int,
    k: int,
    group_size: int,
    scale_bits: int,
    weight_bits: int,
    capability: int = 90,
    gluon: bool = False,
) -> Tile:
    """Tile for ``rows`` rows (token, expert pairs) over ``experts`` stacks of ``n`` output and ``k`` input features.

    ``capability`` is 10 * major + minor of an NVIDIA GPU, 0 for others. ``gluon`` says whether the Gluon kernels can run this.
    """
    accumulate = group_size != -1 and scale_bits > 4 and weight_bits == 4
    # Beside the accumulator the partial sum needs registers: on sm_80, 4 warps spill 24 bytes of this tile, 8 none.
    tall = Tile(64, 128, num_warps=8 if accumulate and capability != 90 else 4)
    # A row more than the tile holds reads the expert's weights a second time, from L2: so a tile for the mean is enough.
    mean = tile_count(rows, max(1, experts))
    busy = min(rows, experts)  # experts that have rows, if routing is even
    # The other formats were assembled, and not timed on a GPU yet.
    if gluon and group_size in (32, 64, 128) and weight_bits == 4:
        tile = _gluon_tile(mean, busy, n, k, schedule_name(group_size, scale_bits, weight_bits))
        if tile is not None:
            return tile
    if mean <= 64:
        if busy * tile_count(n, 128) < SM_COUNT:
            return Tile(16, 64, num_stages=5)  # more programs before larger ones, as in ``choose_tile``
        return Tile(16 if mean <= 16 else 32, 128) if mean <= 32 else tall
    if mean <= 96 or accumulate:  # a second, half empty tile of 128 rows costs more than a third of 64
        return tall
    return Tile(128, 128) if capability == 90 else Tile(128, 128, num_warps=8)


def _gluon_tile(mean: int, busy: int, n: int, k: int, schedule: str) -> Optional[Tile]:
    """Tile of a Gluon kernel, or None where the plain one is faster: its programs begin 3 us earlier (H100)."""
    if mean <= FEW_ROWS:
        few = busy * tile_count(n, 128) < SM_COUNT  # of the plain kernel's tiles
        if k >= 2 * DEEP or few and k >= DEEP:
            return deepest(Tile(8, 32, kernel="decode", steps=4), schedule, most=4)
        return None
    if mean <= MANY_ROWS and (n * k < LARGE_WEIGHT or schedule == "accumulate"):
        return None
    # Half a tile of rows is lost at the end of each expert, which short sums do not win back.
    block_m = 64 if mean <= 40 or k <= 1024 and mean <= 256 else 128
    return deepest(
        Tile(block_m, 128 if schedule == "accumulate" else 256, 8, kernel="cooperative", group_n=4), schedule
    )


def gluon_grouped_tiles(schedule: str, few: bool, decode: bool = True) -> Iterator[Tile]:
    """Tiles to try of the Gluon kernels, for few or many rows an expert; ``decode`` as in ``choose_gluon_tile``."""
    if few and decode and schedule != "int8":
        for m, n, steps, programs in itertools.product((8, 16), (16, 32, 64), (2, 4), (1, 2)):
            tile = Tile(m, n, 8 if n == 64 else 4, kernel="decode", steps=steps, programs_per_sm=programs)
            tile = deepest(tile, schedule, most=4 if steps == 4 else 8)
            if illegal(tile, schedule, 1024) is None:
                yield tile
    if not few:
        wide = (128,) if schedule == "accumulate" else (128, 256)
        for m, n, group_n in itertools.product((64, 128), wide, (4, 16)):
            yield deepest(Tile(m, n, 8, kernel="cooperative", group_n=group_n), schedule)
