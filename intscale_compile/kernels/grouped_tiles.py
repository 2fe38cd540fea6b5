"""Tile shapes of the grouped kernel (mixtures of experts), chosen from the problem size by rules.

The rules start from those of the plain kernel (``tiles``), which were measured. What is different here: rows are spread over
experts, so a tile is as tall as the rows of *one* expert, and how many experts have rows is not known on the host.

Swept on an H100 with the experts of Mixtral-8x7B (``benchmarks/grouped.py --sweep``): for the down projection the choice is
6 % behind the best tile at 32 rows and within 1 % at 4096. ``tile=`` of the launchers overrides it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .gluon_tiles import deepest, illegal
from .tile import SM_COUNT, Tile, tile_count


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

    ``capability`` is 10 * major + minor of an NVIDIA GPU, 0 for others.
    """
    del k
    accumulate = group_size != -1 and scale_bits > 4 and weight_bits == 4
    # Beside the accumulator the partial sum needs registers: on sm_80, 4 warps spill 24 bytes of this tile, 8 none.
    tall = Tile(64, 128, num_warps=8 if accumulate and capability != 90 else 4)
    # A row more than the tile holds reads the expert's weights a second time, from L2: so a tile for the mean is enough.
    mean = tile_count(rows, max(1, experts))
    if mean <= 64:
        busy = min(rows, experts)  # experts that have rows, if routing is even
        if busy * tile_count(n, 128) < SM_COUNT:
            return Tile(16, 64, num_stages=5)  # more programs before larger ones, as in ``choose_tile``
        return Tile(16 if mean <= 16 else 32, 128) if mean <= 32 else tall
    if mean <= 96 or accumulate:  # a second, half empty tile of 128 rows costs more than a third of 64
        return tall
    return Tile(128, 128) if capability == 90 else Tile(128, 128, num_warps=8)


def gluon_grouped_tiles(schedule: str, few: bool, decode: bool = True) -> Iterator[Tile]:
    """Tiles that the Gluon kernels can run, for few or many rows an expert; ``decode`` as in ``choose_gluon_tile``."""
    if few and decode and schedule != "int8":
        for m, n, steps, programs in itertools.product((8, 16), (16, 32, 64), (2, 4), (1, 2)):
            tile = deepest(
                Tile(m, n, 8 if n == 64 else 4, kernel="decode", steps=steps, programs_per_sm=programs), schedule
            )
            if illegal(tile, schedule, 1024) is None:
                yield tile
    if not few:
        sizes = [(64, 128), (128, 128)]
        if schedule != "accumulate":
            sizes += [(64, 256), (128, 256), (256, 128)]
        for (m, n), group_n in itertools.product(sizes, (4, 16)):
            yield deepest(Tile(m, n, 8, kernel="cooperative", group_n=group_n), schedule)
