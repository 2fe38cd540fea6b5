"""Tile shapes of the Triton GEMM, chosen from the problem size.

The shapes come from a sweep of 79 tiles of this kernel on one H100 (torch 2.11, triton 3.6, fold, group 128) at M = 1 to
256, in benchmarks/results/2026-11-22-h100.md, and from one of about 60 tiles of a probe kernel above that. Tiles within 5 %
of the best are taken where one rule then covers more shapes. On other GPUs nothing was timed.
"""

from __future__ import annotations

from dataclasses import dataclass

# Streaming multiprocessors that a grid should at least cover. 108 (A100) to 148 (B200); 132 is the H100 of the sweep.
SM_COUNT = 132


@dataclass(frozen=True)
class Tile:
    """Meta-parameters of a launch: output tile ``block_m x block_n``, ``group_n`` tile columns visited together."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3
    group_n: int = 8


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def choose_tile(
    m: int, n: int, k: int, group_size: int, scale_bits: int = 4, weight_bits: int = 4, capability: int = 90
) -> Tile:
    """Tile for ``m`` tokens, ``n`` output and ``k`` input features.

    ``capability`` is 10 * major + minor of an NVIDIA GPU, 0 for others. ``block_n`` never falls below 64, the rows of
    one wgmma: below it Hopper would drop to the older mma instruction.
    """
    del k
    if m <= 64:
        if _tiles(n, 128) < SM_COUNT:
            # More blocks beat larger ones until all SMs have work, also at M = 64: 53.7 us against 57 at 4096 x 14336.
            return Tile(16, 64, num_stages=5)
        return Tile(16 if m <= 16 else 32 if m <= 32 else 64, 128)
    if _tiles(m, 128) * _tiles(n, 128) < SM_COUNT:
        return Tile(64, 128)
    if capability != 90:
        # Only wgmma reads its right operand from shared memory; elsewhere 4 warps spill (288 bytes and more per thread
        # on sm_80, sm_89, sm_120 by cuobjdump), 8 do not.
        return Tile(128, 128, num_warps=8)
    if group_size != -1 and scale_bits > 4 and weight_bits == 4:
        # Accumulator and partial sum alone fill a thread's 255 registers at 128x128 with 4 warps: 336 bytes spilled.
        return Tile(64, 128)
    return Tile(128, 128)
