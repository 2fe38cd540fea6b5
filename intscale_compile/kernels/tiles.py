"""Tile shapes of the GEMM kernels, chosen from the problem size: from a table where one was measured, else from rules.

The rules here are those of the plain-Triton kernel; those of the Gluon kernels are in ``gluon_tiles``, the tables in
``tile_tables``. They come from a sweep of 79 tiles of this kernel on one H100 (torch 2.11, triton 3.6, fold, group 128) at
M = 1 to 256, in benchmarks/results/2026-11-22-h100.md, and from one of about 60 tiles of a probe kernel above that. Tiles
within 5 % of the best are taken where one rule then covers more shapes. On other GPUs nothing was timed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

from .gluon_tiles import choose_gluon_tile
from .tile import SM_COUNT, Tile, schedule_name, table_schedule, tile_count
from .tile_tables import lookup

FEW_TOKENS = 64  # up to which programs share the sum over K
MOST_PARTS = 8
LEAST_PART = 256  # features of a part


def choose_tile(
    m: int, n: int, k: int, group_size: int, scale_bits: int = 4, weight_bits: int = 4, capability: int = 90
) -> Tile:
    """Tile of the plain-Triton kernel for ``m`` tokens, ``n`` output and ``k`` input features.

    ``capability`` is 10 * major + minor of an NVIDIA GPU, 0 for others. ``block_n`` never falls below 64, the rows of
    one wgmma: below it Hopper would drop to the older mma instruction.
    """
    del k
    if m <= 64:
        if tile_count(n, 128) < SM_COUNT:
            # More blocks beat larger ones until all SMs have work, also at M = 64: 53.7 us against 57 at 4096 x 14336.
            return Tile(16, 64, num_stages=5)
        return Tile(16 if m <= 16 else 32 if m <= 32 else 64, 128)
    if tile_count(m, 128) * tile_count(n, 128) < SM_COUNT:
        return Tile(64, 128)
    if capability != 90:
        # Only wgmma reads its right operand from shared memory; elsewhere 4 warps spill (288 bytes and more per thread
        # on sm_80, sm_89, sm_120 by cuobjdump), 8 do not.
        return Tile(128, 128, num_warps=8)
    if group_size != -1 and scale_bits > 4 and weight_bits == 4:
        # Accumulator and partial sum alone fill a thread's 255 registers at 128x128 with 4 warps: 336 bytes spilled.
        return Tile(64, 128)
    return Tile(128, 128)


def choose(
    m: int,
    n: int,
    k: int,
    group_size: int,
    scale_bits: int,
    weight_bits: int,
    capability: int,
    device_name: str,
    gluon: bool,
    sm_count: int = SM_COUNT,
    in_parts: bool = True,
) -> Tile:
    """Tile for one problem on one GPU: the user's table, the shipped table, then the rules.

    Args:
        m, n, k: tokens, output features, input features; ``m`` is a hint where it is dynamic.
        group_size, scale_bits, weight_bits: of the weight.
        capability: 10 * major + minor of an NVIDIA GPU, 0 for others.
        device_name: as ``torch.cuda.get_device_name`` says it; ``""`` finds no table.
        gluon: whether the Gluon kernels can run this problem here. Without them, their table entries are passed over.
        sm_count: streaming multiprocessors, for the rules.
        in_parts: whether the plain-Triton kernel can share K among programs, which the gated one cannot.

    Raises:
        ConfigError: the user's table is malformed.
    """
    tile = lookup(device_name, table_schedule(group_size, scale_bits, weight_bits), n, k, m) if device_name else None
    if tile is not None and (gluon or tile.kernel == "triton"):
        return tile
    if gluon:
        schedule = schedule_name(group_size, scale_bits, weight_bits)
        return choose_gluon_tile(m, n, k, schedule, sm_count, decode=group_size != 256)
    few = few_tokens_tile(m, n, k, group_size, scale_bits, weight_bits, sm_count) if in_parts else None
    return few or choose_tile(m, n, k, group_size, scale_bits, weight_bits, capability)


def few_tokens_tile(
    m: int, n: int, k: int, group_size: int, scale_bits: int, weight_bits: int, sm_count: int = SM_COUNT
) -> Optional[Tile]:
    """Tile of ``triton_split`` for few tokens, or None where the kernel of :func:`choose_tile` is as fast.

    Parts of K double until every SM has a program, for 17 and more tokens 1.4: of 2, 4 and 8 parts, tiles of 64 and 128
    rows and 3 and 5 stages that was the fastest or within 8 % of it at 6 shapes and 1, 16 and 64 tokens (H200, Triton 3.6;
    benchmarks/plain_triton.py). Up to 16 tokens a word of scales pays with all of K too: 22.7 us instead of 27.9 at
    28672 x 4096 and 16 tokens; groups of 32 and 64 in two parts at least: 30 us there, 37 in one. Tiles have 64 rows where
    those of 128 leave a last wave that is nearly empty (6144 x 4096: 192 programs for 132 SMs, 9.0 instead of 9.7 us; not in
    groups of 32: 14.8 instead of 12.5).
    """
    if m > FEW_TOKENS:
        return None
    tile = Tile(16 if m <= 16 else 32, 128)
    count, parts = tile_count(m, tile.block_m) * tile_count(n, tile.block_n), 1
    while parts < MOST_PARTS and count * parts < (1.0 if m <= 16 else 1.4) * sm_count and k >= LEAST_PART * 2 * parts:
        parts *= 2
    by_words = m <= 16 and weight_bits == 4 and group_size in (32, 64, 128) and scale_bits <= 8
    if by_words and group_size != 128:
        parts = max(2, parts)
    if by_words and group_size == 128 and parts > 1:
        programs = parts * tile_count(n, 64)
        waves, finer = tile_count(programs // 2, sm_count), tile_count(programs, sm_count) / 2
        tile = replace(tile, block_n=64) if finer < 0.8 * waves else tile
    return replace(tile, split_k=parts) if parts > 1 or by_words else None
