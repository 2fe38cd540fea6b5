"""Which tiles the Gluon kernels can run, which one the rules take, and which ones tuning tries.

The rules take the tile with the least predicted time (:mod:`~.tile_costs`) among the kinds that were measured on one H100;
every part of a split K keeps 1024 features.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Optional

from .tile import SM_COUNT, Tile, tile_count
from .tile_costs import COSTS, is_costed, predicted_us

SCHEDULES = ("fold", "accumulate", "none", "float", "int8")
SCALE_BYTES = {"fold": 1, "accumulate": 1, "none": 0, "float": 4, "int8": 0}
SHARED_BYTES = {1: 232448, 2: 116000, 3: 76000}  # of one program, by programs on an SM
RESERVED_BYTES = 2048  # barriers, alignment
BARRIER_BYTES = 512  # the same where every byte counts
LEGAL_WARPS = ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2))  # (warps, programs on an SM) with a register budget
COOPERATIVE = (
    (128, 128, 8, 1),
    (256, 128, 8, 1),
    (128, 256, 8, 1),
    (128, 192, 12, 1),
)  # block_m, block_n, warps, programs
MAX_STAGES = 8
DECODE_TOKENS = 16
MIN_SPLIT_BLOCKS = 8  # blocks of 128 features that a part of K keeps
MAX_SPLIT = 8


def scales_in_block(group_size: int) -> int:
    """Group scales of a row in one block of 128 features."""
    return 128 // group_size if group_size in (32, 64) else 1


def stage_bytes(tile: Tile, schedule: str, groups: int = 1) -> int:
    """Shared memory of one stage: activations, codes and group scales, ``groups`` of them a row in 128 features."""
    if tile.kernel == "decode":
        scale = SCALE_BYTES[schedule] * groups
        return 4 * tile.steps * (tile.block_n * (64 + scale) + tile.block_m * 128)
    codes = tile.block_n * (128 if schedule == "int8" else 64)
    return tile.block_m * 128 + codes + 64 * max(scale_tiles(tile), 2) * SCALE_BYTES[schedule] * groups


def scale_tiles(tile: Tile) -> int:
    """Packing tiles of 64 rows whose group scales are copied for each stage: a power of 2, as boxes of descriptors are."""
    return 4 if tile.block_n == 192 else tile.block_n // 64


def scratch_bytes(tile: Tile, out_bytes: int = 2) -> int:
    """Shared memory beside the ring: the reduction over warps, the epilogue, barriers. ``pipelined`` reuses its ring.

    ``out_bytes`` is the width of an element of the output: 32-bit values (fp32, or the int32 accumulator) change their
    layout through 4 KiB of each warp.
    """
    area = tile.block_m * tile.block_n
    wide = min(4 * area, 4096 * tile.num_warps) if out_bytes > 2 else 0
    if tile.kernel == "cooperative" and out_bytes == 2:  # results on their way, a consumer's token scales
        return BARRIER_BYTES + 2 * area + tile.num_warps * tile.block_m
    narrow = {"decode": 16 * area, "specialized": 2 * area, "pipelined": 0, "cooperative": 8192}[tile.kernel]
    return RESERVED_BYTES + (narrow if tile.kernel in ("decode", "pipelined") else max(narrow, wide))


def shared_bytes(tile: Tile, schedule: str, out_bytes: int = 2, groups: int = 1) -> int:
    """Shared memory of one program."""
    return tile.num_stages * stage_bytes(tile, schedule, groups) + scratch_bytes(tile, out_bytes)


def for_output(tile: Tile, schedule: str, out_bytes: int, groups: int = 1) -> Tile:
    """``tile`` with as many stages as the epilogue of an output of ``out_bytes`` an element leaves room for.

    Tiles are chosen for 16-bit outputs and one group scale in 128 features; ``groups`` is how many there are. The result does
    not depend on the number of stages. Three consumers with two sums each have no registers for the plain stores of wider
    outputs (Triton 3.7 and 3.9), nor for the scales of several groups: two take their place.
    """
    if (out_bytes > 2 or groups > 1) and schedule in ("accumulate", "float") and tile.num_warps == 12:
        tile = deepest(dataclasses.replace(tile, block_n=128, num_warps=8), schedule)
    if shared_bytes(tile, schedule, out_bytes, groups) <= shared_limit(tile):
        return tile
    room = shared_limit(tile) - scratch_bytes(tile, out_bytes)
    return dataclasses.replace(tile, num_stages=room // stage_bytes(tile, schedule, groups))


def shared_limit(tile: Tile) -> int:
    """Shared memory that one program may take; of ``pipelined`` two always share an SM."""
    return SHARED_BYTES[2 if tile.kernel == "pipelined" else tile.programs_per_sm]


def fits_resident(tile: Tile, schedule: str, blocks: int, groups: int = 1) -> bool:
    """Whether a decode tile's ring leaves room for the activations of all ``blocks`` blocks of 128 features."""
    depth = 4 * tile.steps
    ring = tile.num_stages * depth * tile.block_n * (64 + SCALE_BYTES[schedule] * groups)
    resident = tile_count(blocks, depth) * depth * tile.block_m * 128
    return ring + resident + scratch_bytes(tile) <= shared_limit(tile)


def deepest(tile: Tile, schedule: str, most: int = MAX_STAGES) -> Tile:
    """``tile`` with as many stages as fit, at most ``most``; fewer than 2 make it illegal."""
    room = shared_limit(tile) - scratch_bytes(tile)
    return dataclasses.replace(tile, num_stages=max(1, min(most, room // stage_bytes(tile, schedule))))


def illegal(tile: Tile, schedule: str, k: int, decode: bool = True) -> Optional[str]:
    """Why a Gluon kernel cannot run ``tile`` for ``k`` input features, or None.

    ``decode`` says whether the group size (any but 256) suits the decode kernel.
    """
    reason = _decode_illegal(tile, schedule, decode) if tile.kernel == "decode" else _gemm_illegal(tile, schedule, k)
    if reason is not None:
        return reason
    if tile.num_stages < 2:
        return "fewer than 2 stages"
    if shared_bytes(tile, schedule) > shared_limit(tile):
        return f"{shared_bytes(tile, schedule)} bytes of shared memory, {shared_limit(tile)} are there"
    return None


def _decode_illegal(tile: Tile, schedule: str, decode: bool) -> Optional[str]:
    if schedule == "int8" or not decode:
        return "the decode kernel takes 4-bit weights, in groups of any size but 256"
    if tile.block_m not in (8, 16) or tile.block_n not in (16, 32, 64) or tile.steps not in (2, 4) or tile.split_k != 1:
        return "block_m is 8 or 16, block_n 16, 32 or 64, steps 2 or 4, split_k 1 with decode"
    if (tile.num_warps, tile.programs_per_sm) not in LEGAL_WARPS:
        return f"{tile.num_warps} warps with {tile.programs_per_sm} programs on an SM"
    return "8 warps need block_n 32 or more" if tile.num_warps == 8 and tile.block_n < 32 else None


def _gemm_illegal(tile: Tile, schedule: str, k: int) -> Optional[str]:
    m, n, warps, programs = tile.block_m, tile.block_n, tile.num_warps, tile.programs_per_sm
    if tile.kernel == "pipelined":
        if m not in (64, 128) or n not in (64, 128) or (warps, programs) != (4, 1):
            return "pipelined takes blocks of 64 or 128, 4 warps and programs_per_sm 1"
    elif tile.kernel == "specialized":
        if not (m in (16, 32, 64, 128) and n in (64, 128) and warps == 4 or (m, n, warps) == (128, 256, 8)):
            return "specialized takes block_m 16 to 128 with block_n 64 or 128 and 4 warps, or 128 x 256 with 8"
        if programs not in (1, 2) or programs == 2 and m * n >= 128 * 128:
            return f"{programs} programs of {m} x {n} on an SM"  # 128 x 128 spills 12 bytes with two
    elif tile.kernel == "cooperative":
        if (m, n, warps, programs) not in COOPERATIVE:
            return (
                "cooperative takes 128 x 128, 256 x 128 or 128 x 256 with 8 warps, 128 x 192 with 12, programs_per_sm 1"
            )
        if schedule == "accumulate" and m * n > 2048 * warps or schedule == "float" and m * n > 128 * 128:
            return f"{schedule} spills at {m} x {n}"
        if tile.split_k > 1 and schedule in ("accumulate", "float") and m * n > 128 * 128:
            return f"split_k {tile.split_k} with {schedule} spills at {m} x {n}"
    else:
        return f"kernel {tile.kernel!r} is not known"
    if schedule in ("accumulate", "float") and m * n * 4 > 8192 * warps:
        return f"{schedule} spills at {m} x {n} with {warps} warps"
    unroll = 4 if k // 128 % 4 == 0 else 1
    if tile.split_k < 1 or tile.split_k > 1 and k // 128 // unroll < tile.split_k:
        return f"split_k {tile.split_k} of {k} input features"
    return None


@functools.lru_cache(maxsize=4096)
def choose_gluon_tile(m: int, n: int, k: int, schedule: str, sm_count: int = SM_COUNT, *, decode: bool = True) -> Tile:
    """Tile of a Gluon kernel by rule, for ``m`` tokens, ``n`` output and ``k`` input features.

    Args:
        schedule: one of ``SCHEDULES``; ``"none"`` is per channel in 4 bits, ``"int8"`` 8-bit weights.
        sm_count: streaming multiprocessors of the GPU.
        decode: whether the group size (any but 256) suits the decode kernel.
    """
    tiles = list(_costed_tiles(m, n, k, schedule, sm_count))
    if m <= DECODE_TOKENS and decode and schedule != "int8":
        tile = _decode_tile(m, n, k, schedule, sm_count)
        tiles += [tile] if is_costed(tile) else []
    return min(tiles, key=lambda tile: predicted_us(tile, m, n, k, schedule, sm_count))


def _costed_tiles(m: int, n: int, k: int, schedule: str, sm_count: int) -> Iterator[Tile]:
    """Legal tiles whose time can be predicted, as far from the number of tokens as those that were measured.

    A tile of more than twice the tokens would have rows to fill with zeros. K is split only where there are too few tiles
    for all multiprocessors.
    """
    natural = min(128, max(16, 1 << (m - 1).bit_length()))
    for kernel, block_m, block_n, programs in COSTS:
        if kernel == "decode" or 2 * block_m < natural or (block_m > 16 and 2 * m < block_m):
            continue
        tiles = tile_count(m, block_m) * tile_count(n, block_n)
        splits = [s for s in (2, 4, 8) if 10 * tiles * s <= 11 * sm_count and k // 128 // s >= MIN_SPLIT_BLOCKS]
        for split in (1, *(splits if kernel != "pipelined" and programs == 1 else ())):
            tile = costed_tile(kernel, block_m, block_n, programs, split, schedule, group_n=16 if m >= 512 else 8)
            if illegal(tile, schedule, k) is None:
                yield tile


def costed_tile(
    kernel: str, block_m: int, block_n: int, programs: int, split: int, schedule: str, group_n: int = 8
) -> Tile:
    """The tile of a kind that ``COSTS`` lists (but of ``decode``), with the stages that fit; it may be illegal."""
    tile = Tile(
        block_m,
        block_n,
        num_warps=4 if kernel != "cooperative" else 12 if block_n == 192 else 8,
        group_n=group_n,
        kernel=kernel,
        split_k=split,
        programs_per_sm=programs,
    )
    return deepest(tile, schedule, most=4 if kernel == "pipelined" else MAX_STAGES)


def _decode_tile(m: int, n: int, k: int, schedule: str, sm_count: int) -> Tile:
    """One wave of programs where that is possible, two programs on an SM where one wave is not quite enough."""
    block_m, steps = 8 if m <= 8 else 16, 4 if k > 8 * 128 else 2
    tile = Tile(block_m, 32, kernel="decode", steps=steps)
    if tile_count(n, 16) <= sm_count:
        tile = Tile(block_m, 16, kernel="decode", steps=steps)
    elif sm_count < tile_count(n, 32) <= 2 * sm_count:
        tile = Tile(block_m, 32 if block_m == 8 else 16, kernel="decode", steps=steps, programs_per_sm=2)
    fitted = deepest(tile, schedule, most=4 if steps == 4 else 8)
    # Float scales take 4 bytes a row and block: a shallower stage keeps two of them in flight.
    return fitted if fitted.num_stages >= 2 else deepest(dataclasses.replace(tile, steps=2), schedule)


def gated_tile(tile: Tile, schedule: str) -> Tile:
    """``tile`` if a gated launch can run it, else the nearest that it can: one with 64 rows or more of gate and of up."""
    if tile.kernel == "cooperative" and tile.block_n == 128:
        return tile
    if tile.kernel not in ("decode", "cooperative") and tile.block_n >= 128:
        return tile
    return without_copies(tile, schedule)


def without_copies(tile: Tile, schedule: str) -> Tile:
    """The ``specialized`` tile nearest to ``tile`` in a gated launch: it needs no copies of results by the memory accelerator."""
    two_sums = schedule in ("accumulate", "float")
    block_m = max(16, min(tile.block_m, 64 if two_sums else 128))
    split_k = tile.split_k if tile.kernel == "specialized" else 1
    return deepest(Tile(block_m, 128, group_n=tile.group_n, kernel="specialized", split_k=split_k), schedule)


@functools.lru_cache(maxsize=4096)
def choose_gated_tile(m: int, n: int, k: int, schedule: str, sm_count: int = SM_COUNT) -> Tile:
    """As :func:`choose_gluon_tile` for a gated launch: ``n`` counts the rows of gate and up."""
    tiles = [t for t in _costed_tiles(m, n, k, schedule, sm_count) if gated_tile(t, schedule) == t]
    return min(tiles, key=lambda tile: predicted_us(tile, m, n, k, schedule, sm_count))


def gluon_candidates(
    m: int, n: int, k: int, schedule: str, sm_count: int = SM_COUNT, *, decode: bool = True
) -> list[Tile]:
    """Legal tiles worth timing for a problem, the rule's choice first."""
    tiles = [choose_gluon_tile(m, n, k, schedule, sm_count, decode=decode)]
    if m <= DECODE_TOKENS:
        tiles += _decode_candidates(8 if m <= 8 else 16, schedule)
    if m > DECODE_TOKENS or not decode or schedule == "int8":
        tiles += _specialized_candidates(m, n, k, schedule, sm_count)
    if m > 64:
        tiles += _cooperative_candidates(m, n, k, schedule, sm_count)
    if m >= 128:
        for bm, bn, group_n in itertools.product((64, 128), (64, 128), (8, 16)):
            if bm * bn >= 64 * 128 or tile_count(m, 64) * tile_count(n, 64) <= 2 * sm_count:
                tiles.append(deepest(Tile(bm, bn, group_n=group_n, kernel="pipelined"), schedule, most=4))
    return list(dict.fromkeys(tile for tile in tiles if illegal(tile, schedule, k, decode) is None))


def _decode_candidates(block_m: int, schedule: str) -> Iterator[Tile]:
    for block_n, warps, steps, programs in itertools.product((16, 32, 64), (4, 8), (2, 4), (1, 2)):
        tile = Tile(block_m, block_n, warps, kernel="decode", steps=steps, programs_per_sm=programs)
        if (block_n, warps) not in ((16, 8), (64, 4)):  # neither was among the winners of the sweeps
            yield deepest(tile, schedule)
            yield deepest(tile, schedule, most=4 if steps == 2 else 3)


def _cooperative_candidates(m: int, n: int, k: int, schedule: str, sm_count: int) -> Iterator[Tile]:
    for (bm, bn, warps, _), split in itertools.product(COOPERATIVE, (1, 2, 4)):
        tiles = tile_count(m, bm) * tile_count(n, bn) * split
        too_many = split > 1 and (10 * tiles > 11 * sm_count or k // 128 // split < MIN_SPLIT_BLOCKS)
        if 2 * m > bm and not too_many:
            yield deepest(
                Tile(bm, bn, warps, group_n=16 if m >= 512 else 8, kernel="cooperative", split_k=split), schedule
            )


def _specialized_candidates(m: int, n: int, k: int, schedule: str, sm_count: int) -> Iterator[Tile]:
    natural = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    blocks = (natural,) if m <= 64 else (64, 128)
    shapes = [(bm, bn, 4, programs) for bm, bn, programs in itertools.product(blocks, (64, 128), (1, 2))]
    if m >= 256:
        shapes.append((128, 256, 8, 1))
    for (bm, bn, warps, programs), split in itertools.product(shapes, (1, 2, 4, 8)):
        tiles = tile_count(m, bm) * tile_count(n, bn)
        # Less than half a wave, or parts too short, or split although all SMs have work: not worth a try.
        too_few = split == 1 and 4 * tiles < sm_count and k // 128 >= 2 * MIN_SPLIT_BLOCKS
        too_many = split > 1 and (tiles * split > sm_count * programs or k // 128 // split < MIN_SPLIT_BLOCKS)
        if too_few or too_many or (m >= 1024 and bn == 64):
            continue
        group_n = 16 if m >= 512 else 8
        tile = Tile(bm, bn, warps, group_n=group_n, kernel="specialized", split_k=split, programs_per_sm=programs)
        yield deepest(tile, schedule)
