"""Predicted time of the Gluon kernels: waves of tiles, blocks of K, bytes.

A tile costs ``tile + block * blocks`` microseconds, where ``blocks`` are the packing blocks of 128 features of its part of K,
and tiles go in waves of one or two on every streaming multiprocessor. Where two programs share one, a last wave that needs
one of them only is faster a block. Parts of K of large tiles write their sums and read the others'. No time is below that of the
bytes. For one tile the prediction never falls when tokens are added, so neither does that of the best of a fixed set of tiles.

The constants were fitted (``benchmarks/fit_tiles.py``) to sweeps of ``benchmarks/tile_sweep.py`` on H100s: 8 to 11 shapes, 1
to 4096 tokens, groups of 128 with 4-bit scales, and from 129 tokens on with 8-bit scales. Those that name an H200 were then
moved to its times of 65 to 512 tokens (a few of 1000 and 4096), with a penalty on the distance from the H100's, three of
them then by hand (benchmarks/results/2026-11-28-h200-ahead.md).
"""

from __future__ import annotations

from typing import NamedTuple

from .tile import SM_COUNT, Tile, tile_count

BYTES_PER_US = 2.75e6
LAUNCH_US = 1.5
PARTIAL_BYTES_PER_US = 3.7e6  # an H200: 6.3 MB in 1.9 us, 12.6 in 3.6, 25.2 in 7.0


class Cost(NamedTuple):
    """Microseconds of a launch, a tile, a block alone and beside a second program on the multiprocessor, a further part of K."""

    start: float
    tile: float
    block_alone: float
    block: float
    split: float


# By kernel, block_m, block_n, programs_per_sm; behind each how many points it was fitted to, and the error.
COSTS: dict[tuple[str, int, int, int], Cost] = {
    ("cooperative", 128, 128, 1): Cost(1.779, 1.157, 0.375, 0.375, 1.0),  # 43 points of an H200, by hand
    ("cooperative", 128, 192, 1): Cost(1.186, 2.14, 0.485, 0.485, 0.556),  # 53 points of an H200, 3.5% (rms)
    ("cooperative", 128, 256, 1): Cost(1.159, 3.046, 0.651, 0.651, 0.785),  # 42 points of an H200, 2.6% (rms)
    ("cooperative", 256, 128, 1): Cost(0.744, 3.375, 0.593, 0.593, 0.598),  # 34 points of an H200, 2.0% (rms)
    ("decode", 8, 32, 1): Cost(1.656, 1.12, 0.073, 0.073, 1.5),  # 27 points, 5.0% (rms)
    ("decode", 8, 32, 2): Cost(1.026, 0.577, 0.086, 0.161, 1.5),  # 6 points, 4.0% (rms)
    ("decode", 16, 32, 1): Cost(2.173, 0.846, 0.097, 0.097, 1.5),  # 9 points, 4.9% (rms)
    ("pipelined", 64, 128, 1): Cost(0.589, 2.375, 0.495, 0.599, 1.5),  # 122 points, 4.9% (rms)
    ("pipelined", 128, 64, 1): Cost(0.106, 2.219, 0.394, 0.478, 1.5),  # 127 points, 4.5% (rms)
    ("pipelined", 128, 128, 1): Cost(2.375, 2.025, 0.556, 0.764, 1.5),  # 138 points, 7.1% (rms)
    ("specialized", 16, 64, 1): Cost(0.136, 0.916, 0.211, 0.211, 1.879),  # 60 points, 4.7% (rms)
    ("specialized", 16, 64, 2): Cost(1.846, 0.062, 0.255, 0.369, 1.5),  # 20 points, 4.5% (rms)
    ("specialized", 16, 128, 1): Cost(0.027, 1.878, 0.278, 0.278, 1.194),  # 80 points, 6.3% (rms)
    ("specialized", 16, 128, 2): Cost(0.055, 0.043, 0.467, 0.621, 1.5),  # 20 points, 4.3% (rms)
    ("specialized", 32, 64, 1): Cost(0.912, 0.517, 0.209, 0.209, 1.805),  # 52 points, 5.0% (rms)
    ("specialized", 32, 64, 2): Cost(1.415, 1.545, 0.246, 0.249, 1.5),  # 24 points, 6.4% (rms)
    ("specialized", 32, 128, 1): Cost(0.064, 1.366, 0.287, 0.287, 2.203),  # 70 points, 6.4% (rms)
    ("specialized", 32, 128, 2): Cost(2.925, 0.04, 0.316, 0.48, 1.5),  # 20 points, 8.3% (rms)
    ("specialized", 64, 64, 1): Cost(1.411, 0.773, 0.202, 0.202, 2.129),  # 117 points, 5.3% (rms)
    ("specialized", 64, 64, 2): Cost(1.015, 0.889, 0.227, 0.293, 1.5),  # 18 points of an H200, 5.6% (rms)
    ("specialized", 64, 128, 1): Cost(0.976, 1.281, 0.285, 0.285, 2.831),  # 146 points, 6.1% (rms)
    ("specialized", 64, 128, 2): Cost(1.06, 1.822, 0.387, 0.483, 1.5),  # 79 points, 6.2% (rms)
    ("specialized", 128, 64, 1): Cost(1.264, 1.058, 0.235, 0.235, 4.2),  # 24 points of an H200, by hand
    ("specialized", 128, 64, 2): Cost(0.055, 1.909, 0.314, 0.407, 1.5),  # 19 points of an H200, 4.8% (rms)
    ("specialized", 128, 128, 1): Cost(1.103, 2.871, 0.391, 0.391, 7.6),  # 28 points of an H200, 7.2% (rms)
}
# The same with 8-bit group scales, which multiply the sums of a group; other kinds by TWO_SUMS.
COSTS_TWO_SUMS: dict[tuple[str, int, int, int], Cost] = {
    ("cooperative", 128, 128, 1): Cost(2.174, 0.795, 0.492, 0.492, 3.534),  # 89 points, 3.3% (rms)
    ("cooperative", 128, 192, 1): Cost(1.98, 1.666, 0.654, 0.654, 1.5),  # 55 points, 3.7% (rms)
    ("pipelined", 64, 128, 1): Cost(2.789, 2.475, 0.538, 0.653, 1.5),  # 54 points, 3.8% (rms)
    ("pipelined", 128, 64, 1): Cost(1.973, 1.413, 0.487, 0.583, 1.5),  # 55 points, 3.9% (rms)
    ("specialized", 64, 64, 1): Cost(1.618, 0.809, 0.242, 0.242, 1.5),  # 36 points, 2.5% (rms)
    ("specialized", 64, 64, 2): Cost(1.665, 0.561, 0.31, 0.367, 1.5),  # 35 points, 2.0% (rms)
    ("specialized", 64, 128, 1): Cost(1.66, 1.122, 0.382, 0.382, 2.671),  # 42 points, 3.0% (rms)
    ("specialized", 64, 128, 2): Cost(2.204, 1.362, 0.565, 0.613, 1.5),  # 35 points, 2.5% (rms)
    ("specialized", 128, 64, 1): Cost(1.68, 1.132, 0.364, 0.364, 1.5),  # 44 points, 2.8% (rms)
    ("specialized", 128, 64, 2): Cost(1.047, 1.674, 0.517, 0.565, 1.5),  # 37 points, 2.0% (rms)
}
TWO_SUMS = 1.1  # times a block


def is_costed(tile: Tile) -> bool:
    """Whether the time of ``tile`` can be predicted."""
    return (tile.kernel, tile.block_m, tile.block_n, tile.programs_per_sm) in COSTS


def predicted_us(tile: Tile, m: int, n: int, k: int, schedule: str, sm_count: int = SM_COUNT) -> float:
    """Microseconds that ``tile`` is expected to take for ``m`` tokens, ``n`` output and ``k`` input features.

    Raises:
        KeyError: nothing was fitted for a tile of this kind.
    """
    kind = tile.kernel, tile.block_m, tile.block_n, tile.programs_per_sm
    two_sums = schedule in ("accumulate", "float")
    cost, factor = COSTS[kind], TWO_SUMS if two_sums else 1.0
    if two_sums and kind in COSTS_TWO_SUMS:
        cost, factor = COSTS_TWO_SUMS[kind], 1.0
    together = 2 if tile.kernel == "pipelined" else tile.programs_per_sm
    tiles = tile_count(m, tile.block_m) * tile_count(n, tile.block_n) * tile.split_k
    blocks = tile_count(k, 128) / tile.split_k * factor
    waves, rest = divmod(tiles, sm_count * together)
    time = cost.start + waves * (cost.tile + cost.block * blocks) + cost.split * (tile.split_k - 1)
    if not two_sums:
        time += partial_us(tile, m, n)
    if rest:
        time += cost.tile + (cost.block if rest > sm_count else cost.block_alone) * blocks
    moved = n * k * (1 if schedule == "int8" else 0.5) + n * k / 128 + m * k + 2 * m * n
    memory = LAUNCH_US + moved / BYTES_PER_US
    return float((time**8 + memory**8) ** 0.125)


def partial_us(tile: Tile, m: int, n: int) -> float:
    """Microseconds in which parts of K write their sums, 4 bytes each, and the last part of each tile reads the others'.

    Of cooperative tiles with one sum; of the others it is in the constant of a further part.
    """
    if tile.split_k == 1 or tile.kernel != "cooperative":
        return 0.0
    written = tile_count(m, tile.block_m) * tile_count(n, tile.block_n) * tile.block_m * tile.block_n * 4 * tile.split_k
    return written * (2 - 1 / tile.split_k) / PARTIAL_BYTES_PER_US
