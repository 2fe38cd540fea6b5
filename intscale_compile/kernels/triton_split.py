"""Plain-Triton kernel of the W4A8 linear layer for few tokens: parts of K in different programs, for every GPU.

A layer with few output features has too few tiles to fill a GPU. Here PARTS programs share a tile: each writes its int32 sum,
and the one that arrives last, by a counter, adds them and applies the scales. Integer sums do not depend on the order.

Symmetric 4-bit weights in groups of at most 128 are summed a *word* at a time: the scales of up to four groups are fetched
together, as bytes of one 32-bit word, and multiply the sums of their groups. For few tokens that costs less than multiplying them
into the codes. All other formats take the loop of ``triton_tile``.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..format import pack_block
from .launching import launch
from .split_k import take_counters
from .tile import Tile, tile_count
from .triton_epilogue import add_bias, dequantize_tile
from .triton_tile import accumulate_tile, part_of, unpack_codes, weight_offsets

WORD_GROUPS = 4  # bytes of a word


@triton.jit
def load_words(pointers, STRIDE: tl.constexpr, GROUPS: tl.constexpr):
    """Scales of GROUPS groups, each STRIDE bytes behind the one before, as bytes of an int32 ``[BLOCK_N]``."""
    group = tl.arange(0, GROUPS)
    scales = tl.load(pointers[:, None] + (group * STRIDE)[None, :]).to(tl.int32)
    return tl.sum(scales << (8 * group)[None, :], 1)


@triton.jit
def accumulate_words(
    xq_ptr, xq_stride, qdata_ptr, scale_ptr, rows_m, rows_n, K, part, GROUP_SIZE: tl.constexpr, PACK: tl.constexpr,
    TILED: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Sum over one part of K, int32 ``[BLOCK_N, BLOCK_M]``, a word of BLOCKS packing blocks a step; K is a multiple of it."""
    HALF: tl.constexpr = PACK // 2
    GROUPS: tl.constexpr = 2 if GROUP_SIZE == 32 else 1  # of a packing block
    W_STEP: tl.constexpr = HALF * 64 if TILED else HALF
    S_STEP: tl.constexpr = 64 if TILED else 1
    WORD: tl.constexpr = BLOCKS * GROUPS
    steps = K // (PACK * BLOCKS)
    first, last = part_of(steps, part, PARTS)
    half_range = tl.arange(0, HALF)
    w_ptrs = qdata_ptr + weight_offsets(rows_n, steps * (BLOCKS * HALF), TILED, HALF)[:, None] + half_range[None, :]
    w_ptrs += first * (BLOCKS * W_STEP)
    x_ptrs = xq_ptr + rows_m.to(tl.int64)[None, :] * xq_stride + half_range[:, None] + first * (BLOCKS * PACK)
    s_ptrs = scale_ptr + weight_offsets(rows_n, steps * WORD, TILED, 1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    zero = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    next_words = load_words(s_ptrs + first * (WORD * S_STEP), S_STEP, WORD)
    for step in tl.range(first, last):
        words = next_words  # bytes are too narrow for an asynchronous copy: fetched a step ahead
        next_words = load_words(s_ptrs + tl.minimum(step + 1, last - 1) * (WORD * S_STEP), S_STEP, WORD)
        for block in tl.static_range(BLOCKS):
            low, high = unpack_codes(tl.load(w_ptrs + block * W_STEP), True, PTX)
            partial = tl.dot(low, tl.load(x_ptrs + block * PACK), zero, out_dtype=tl.int32)
            if GROUPS == 2:
                acc += (partial >> 4) * (words >> (16 * block) & 255)[:, None]
                partial = zero
            partial = tl.dot(high, tl.load(x_ptrs + (block * PACK + HALF)), partial, out_dtype=tl.int32)
            acc += (partial >> 4) * (words >> (8 * (block * GROUPS + GROUPS - 1)) & 255)[:, None]
        w_ptrs += BLOCKS * W_STEP
        x_ptrs += BLOCKS * PACK
    return acc


@triton.jit
def sum_of_parts(
    acc, parts_ptr, counters_ptr, tile, part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr
):
    """Hand a part's sum in; ``(whether all have come, the whole sum)``. The last one leaves the counter at 0."""
    cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    parts = parts_ptr + tile.to(tl.int64) * (PARTS * BLOCK_N * BLOCK_M) + cell
    tl.store(parts + part * (BLOCK_N * BLOCK_M), acc)
    tl.debug_barrier()  # every thread's part is written before one of them counts it
    last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == PARTS - 1
    if last:
        acc = tl.load(parts, cache_modifier=".cg")
        for other in tl.static_range(1, PARTS):
            acc += tl.load(parts + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
        tl.store(counters_ptr + tile, 0)
    return last, acc


@triton.jit
def w4a8_split_kernel(
    xq_ptr, token_scale_ptr, qdata_ptr, scale_ptr, zero_ptr, row_scale_ptr, bias_ptr, out_ptr, parts_ptr, counters_ptr,
    M, N, K, xq_stride,
    DEQUANTIZE: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP_SIZE: tl.constexpr, PACK: tl.constexpr,
    WEIGHT_BITS: tl.constexpr, FOLD: tl.constexpr, TIMES16: tl.constexpr, ASYMMETRIC: tl.constexpr,
    TILED: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One part of one tile of ``out[m, n]`` as ``w4a8_kernel`` computes it; BLOCKS of a word, or 0: the loop of any format.

    OVERLAP: programs are started while the kernel before still runs, and wait for it before they read or write anything.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.where(m < M, m, 0)
    rows_n = tl.where(n < N, n, 0)
    if BLOCKS > 0:
        acc = accumulate_words(
            xq_ptr, xq_stride, qdata_ptr, scale_ptr, rows_m, rows_n, K, part,
            GROUP_SIZE, PACK, TILED, PTX, BLOCK_M, BLOCK_N, BLOCKS, PARTS,
        )  # fmt: skip
    else:
        acc = accumulate_tile(
            xq_ptr, xq_stride, qdata_ptr, scale_ptr, zero_ptr, rows_m, rows_n, K,
            GROUP_SIZE, PACK, WEIGHT_BITS, FOLD, TIMES16, ASYMMETRIC, TILED, EVEN_K, PTX, BLOCK_M, BLOCK_N, part, PARTS,
        )  # fmt: skip
    last = True
    if PARTS > 1:
        last, acc = sum_of_parts(acc, parts_ptr, counters_ptr, tile, part, BLOCK_M, BLOCK_N, PARTS)
    if last:
        out_ptrs = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
        mask = (m < M)[None, :] & (n < N)[:, None]
        if DEQUANTIZE:
            y = dequantize_tile(acc, token_scale_ptr, 1, row_scale_ptr, rows_m, rows_n)
            if HAS_BIAS:
                y = add_bias(y, bias_ptr, rows_n)
            tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(out_ptrs, acc, mask=mask)


def blocks_in_word(k: int, group_size: int, scale_dtype: torch.dtype, weight_bits: int, asymmetric: bool) -> int:
    """Packing blocks whose scales are fetched together, or 0 where a format is not summed by words."""
    if weight_bits != 4 or asymmetric or scale_dtype is not torch.uint8 or group_size not in (32, 64, 128):
        return 0
    most = WORD_GROUPS // (2 if group_size == 32 else 1)
    return next((blocks for blocks in (most, most // 2, 1) if k % (pack_block(group_size) * blocks) == 0), 0)


def takes_words(tile: Tile, blocks: int) -> bool:
    """Whether a tile with all of K is summed by words too: for few tokens that is faster than ``fold_codes``."""
    return blocks > 0 and tile.block_m <= 16


def launch_split(
    out: Tensor,
    xq: Tensor,
    token_scale: Optional[Tensor],
    qdata: Tensor,
    scale: Tensor,
    row_scale: Optional[Tensor],
    bias: Optional[Tensor],
    zero_point: Optional[Tensor],
    tile: Tile,
    flags: dict[str, Any],
    overlap: bool = False,
) -> None:
    """Fill ``out`` ``[M, N]`` as ``w4a8_kernel`` does; ``flags`` are those of ``schedule_flags`` and PTX.

    ``overlap``: programmatic dependent launch, on GPUs from Hopper on.
    """
    (m, k), n = xq.shape, out.shape[1]
    flags = {name: value for name, value in flags.items() if name != "GROUP_N"}
    group_size, weight_bits = flags["GROUP_SIZE"], flags["WEIGHT_BITS"]
    blocks = blocks_in_word(k, group_size, scale.dtype, weight_bits, flags["ASYMMETRIC"])
    features = pack_block(group_size) * (blocks or (2 if group_size == 256 else 1))
    parts = min(tile.split_k, tile_count(k, features))
    tiles = tile_count(m, tile.block_m) * tile_count(n, tile.block_n)
    partial = counters = None
    if parts > 1:
        partial = torch.empty(tiles * parts * tile.block_m * tile.block_n, dtype=torch.int32, device=xq.device)
        counters = take_counters(xq.device, tiles)
    launch(
        w4a8_split_kernel, (tiles * parts,),
        xq, token_scale, qdata, scale, zero_point, row_scale, bias, out, partial, counters, m, n, k, xq.stride(0),
        DEQUANTIZE=token_scale is not None, HAS_BIAS=bias is not None, BLOCKS=blocks, PARTS=parts, OVERLAP=overlap,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **({"launch_pdl": True} if overlap else {}), **flags,
    )  # fmt: skip
