"""Triton device functions of the W4A8 linear layer: one output tile, from packed weights to the int32 accumulator.

They serve the eager kernel (``triton_gemm.py``) and, as source text, the Inductor template (``template.py``). For the
second use they refer to nothing but each other, ``tl`` and ``triton``, and hold no backslash and no pair of braces that
Jinja would read as its own.

The tile is computed transposed, ``acc[n, m] = sum_k w[n, k] * x[m, k]``: of the operands of a tensor core only the left
one may come from registers on Hopper, and it is the weight that is expanded in registers.

Shapes and meta-parameters used throughout (``P`` is the packing block of ``format.py``):

=============  =====================================================================================================
GROUP_SIZE     32, 64, 128, 256 or -1 (one group per row)
PACK           P: codes per packing block, 64 for groups of 32 and 64, else 128
WEIGHT_BITS    4 (packed uint8) or 8 (int8 codes)
FOLD           multiply the group scale into the int8 weight (needs scales of at most 15) instead of the accumulator
TIMES16        leave codes in the high half of their byte, 16 times too large, and shift the sum right by 4
TILED          rows of qdata and scale are reordered as ``format.tile_rows`` does
ASYMMETRIC     groups have zero points; FOLD then needs scales of at most 7, and TIMES16 is False. Zero points of int16 are
               offsets in units of the row scale: they multiply the sum of a group's activations, and FOLD is False
EVEN_K         K is a whole number of steps, so activation loads need no mask
PTX            use NVIDIA inline assembly; the plain twin serves AMD and the interpreter
=============  =====================================================================================================
"""

from __future__ import annotations

import inspect

import triton
import triton.language as tl

from .triton_epilogue import add_bias, dequantize_tile
from .triton_zero_points import center_codes, load_factors, offset_product


@triton.jit
def tile_position(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr):
    """Map a program id to ``(tile_m, tile_n)``: GROUP_N columns of tiles share their weights in L2 over all of M."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    width = GROUP_N * tiles_m
    first = (pid // width) * GROUP_N
    span = tl.minimum(tiles_n - first, GROUP_N)
    return (pid % width) // span, first + (pid % width) % span


@triton.jit
def unpack_codes(packed, TIMES16: tl.constexpr, PTX: tl.constexpr):
    """Expand uint8 ``[BLOCK_N, P/2]`` into the codes of its two halves, int8 each (16 times too large if TIMES16)."""
    if PTX and TIMES16:
        # In the high nibble u ^ 8 is the two's complement of u - 8, times 16: no borrow can cross a byte.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $2, 4;
            lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;
            lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
            }""",
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    elif PTX:
        # Bit 7 is set before 8 is subtracted, so that no byte borrows from its neighbour, and flipped back after.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u;
            shr.u32 u, $2, 4;
            lop3.b32 t, $2, 0x0F0F0F0F, 0x80808080, 0xEA;
            lop3.b32 u, u, 0x0F0F0F0F, 0x80808080, 0xEA;
            sub.u32 t, t, 0x08080808;
            sub.u32 u, u, 0x08080808;
            xor.b32 $0, t, 0x80808080;
            xor.b32 $1, u, 0x80808080;
            }""",
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed & 15).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
        if TIMES16:
            low = low * 16
            high = high * 16
    return low, high


@triton.jit
def fold_codes(packed, scales, TWO_SCALES: tl.constexpr, PTX: tl.constexpr):
    """Expand uint8 ``[BLOCK_N, P/2]`` into ``code * scale`` of its two halves, int8 each.

    ``scales`` is int32 ``[BLOCK_N]``, 1 to 15: one scale per row, or with TWO_SCALES ``low | high << 16``, one for each
    half. They travel in one tensor because each costs a trip through shared memory to the layout of the weights.
    A thread must hold codes of a row in runs of four or more: so it does in tiles of at least 4 bytes per thread.
    """
    # Four bytes at once: u * s + (128 - 8 s) lies in [8, 233] for u and s up to 15, so nothing carries between bytes;
    # flipping bit 7 then takes 128 off. The offset is written for each word; the assembler computes it once per row.
    if PTX and TWO_SCALES:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, a, b, c, d;
            and.b32 a, $3, 0xFFFF;
            shr.u32 b, $3, 16;
            mad.lo.u32 c, a, 0xF7F7F7F8, 0x80808080;
            mad.lo.u32 d, b, 0xF7F7F7F8, 0x80808080;
            shr.u32 u, $2, 4;
            and.b32 t, $2, 0x0F0F0F0F;
            and.b32 u, u, 0x0F0F0F0F;
            mad.lo.u32 t, t, a, c;
            mad.lo.u32 u, u, b, d;
            xor.b32 $0, t, 0x80808080;
            xor.b32 $1, u, 0x80808080;
            }""",
            "=&r,=r,r,r,r,r,r",
            [packed, tl.broadcast_to(scales[:, None], packed.shape)],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    elif PTX:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, c;
            mad.lo.u32 c, $3, 0xF7F7F7F8, 0x80808080;
            shr.u32 u, $2, 4;
            and.b32 t, $2, 0x0F0F0F0F;
            and.b32 u, u, 0x0F0F0F0F;
            mad.lo.u32 t, t, $3, c;
            mad.lo.u32 u, u, $3, c;
            xor.b32 $0, t, 0x80808080;
            xor.b32 $1, u, 0x80808080;
            }""",
            "=&r,=r,r,r,r,r,r",
            [packed, tl.broadcast_to(scales[:, None], packed.shape)],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        scale_low = (scales & 65535).to(tl.int8)
        scale_high = (scales >> 16).to(tl.int8) if TWO_SCALES else scale_low
        low = ((packed & 15).to(tl.int8) - 8) * scale_low[:, None]
        high = ((packed >> 4).to(tl.int8) - 8) * scale_high[:, None]
    return low, high


@triton.jit
def load_scales(pointers, TWO_SCALES: tl.constexpr, STRIDE: tl.constexpr):
    """Scales of one step as int32 ``[BLOCK_N]``: one, or the two of a packing block of 64 as ``low | high << 16``."""
    scales = tl.load(pointers).to(tl.int32)
    if TWO_SCALES:
        scales = scales | (tl.load(pointers + STRIDE).to(tl.int32) << 16)
    return scales


@triton.jit
def load_activations(pointers, first_k, K, DEPTH: tl.constexpr, EVEN_K: tl.constexpr):
    """Load int8 ``[DEPTH, BLOCK_M]``; beyond K the values are 0: it is not our memory, and codes there need not be 0."""
    if EVEN_K:
        return tl.load(pointers)
    return tl.load(pointers, mask=(first_k + tl.arange(0, DEPTH) < K)[:, None], other=0)


@triton.jit
def weight_offsets(rows, columns, TILED: tl.constexpr, BLOCK: tl.constexpr):
    """Offset of the first element of each row (int64 ``[BLOCK_N]``) in a matrix of ``columns`` columns.

    ``BLOCK`` is the width of a tile column: bytes of a packing block for the codes, 1 for the group scales.
    """
    rows = rows.to(tl.int64)
    if TILED:
        return (rows // 64) * 64 * columns + (rows % 64) * BLOCK
    return rows * columns


@triton.jit
def part_of(steps, part, PARTS: tl.constexpr):
    """First step of a part of K, and the step behind its last."""
    if PARTS == 1:
        return 0, steps
    return steps * part // PARTS, steps * (part + 1) // PARTS


@triton.jit
def accumulate_int4(
    xq_ptr, xq_stride, qdata_ptr, scale_ptr, zero_ptr, rows_m, rows_n, K,
    GROUP_SIZE: tl.constexpr, PACK: tl.constexpr, FOLD: tl.constexpr, TIMES16: tl.constexpr, ASYMMETRIC: tl.constexpr,
    TILED: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    part, PARTS: tl.constexpr,
):  # fmt: skip
    """K loop over packed 4-bit weights; returns int32 ``[BLOCK_N, BLOCK_M]``, unscaled (and x16) if GROUP_SIZE is -1.

    A step covers one packing block, or the two blocks of a group of 256. ``rows_m`` and ``rows_n`` must be in range.
    """
    HALF: tl.constexpr = PACK // 2
    PER_CHANNEL: tl.constexpr = GROUP_SIZE == -1
    BLOCKS: tl.constexpr = 2 if GROUP_SIZE == 256 else 1
    GROUPS: tl.constexpr = 2 if GROUP_SIZE == 32 else 1
    W_STEP: tl.constexpr = HALF * 64 if TILED else HALF
    S_STEP: tl.constexpr = 64 if TILED else 1
    steps = tl.cdiv(K, PACK * BLOCKS)
    half_range = tl.arange(0, HALF)
    first, last = part_of(steps, part, PARTS)
    w_ptrs = qdata_ptr + weight_offsets(rows_n, steps * (BLOCKS * HALF), TILED, HALF)[:, None] + half_range[None, :]
    x_ptrs = xq_ptr + rows_m.to(tl.int64)[None, :] * xq_stride + half_range[:, None]
    if PARTS > 1:
        w_ptrs += first * (BLOCKS * W_STEP)
        x_ptrs += first * (BLOCKS * PACK)
    # One group per row is the same address plain or tiled.
    s_offsets = rows_n if PER_CHANNEL else weight_offsets(rows_n, steps * GROUPS, TILED, 1)
    s_ptrs = scale_ptr + s_offsets
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    if ASYMMETRIC:
        z_ptrs = zero_ptr + s_offsets
        OFFSETS: tl.constexpr = zero_ptr.dtype.element_ty == tl.int16
    else:
        OFFSETS: tl.constexpr = False  # type: ignore[no-redef]
    CENTERED: tl.constexpr = ASYMMETRIC and not OFFSETS
    first_group = 0 if PER_CHANNEL else first * (GROUPS * S_STEP)
    if CENTERED:
        next_factors = load_factors(s_ptrs + first_group, z_ptrs + first_group, FOLD, GROUPS == 2, S_STEP)
    if not PER_CHANNEL:
        next_scales = load_scales(s_ptrs + first_group, GROUPS == 2, S_STEP)
    for step in tl.range(first, last):
        if not PER_CHANNEL:
            # A scale is one byte, too narrow for an asynchronous copy: fetch it a step ahead to hide its latency.
            scales = next_scales
            next_step = tl.minimum(step + 1, last - 1)
            next_scales = load_scales(s_ptrs + next_step * (GROUPS * S_STEP), GROUPS == 2, S_STEP)
        if CENTERED:
            factors = next_factors
            if not PER_CHANNEL:
                group = tl.minimum(step + 1, last - 1) * (GROUPS * S_STEP)
                next_factors = load_factors(s_ptrs + group, z_ptrs + group, FOLD, GROUPS == 2, S_STEP)
        if not (PER_CHANNEL or FOLD):
            partial = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
        for block in tl.static_range(BLOCKS):
            first_k = (step * BLOCKS + block) * PACK
            packed = tl.load(w_ptrs + block * W_STEP)
            x_low = load_activations(x_ptrs + block * PACK, first_k, K, HALF, EVEN_K)
            x_high = load_activations(x_ptrs + (block * PACK + HALF), first_k + HALF, K, HALF, EVEN_K)
            if PER_CHANNEL or FOLD:
                if CENTERED:
                    low, high = center_codes(packed, factors, PTX)
                elif PER_CHANNEL:
                    low, high = unpack_codes(packed, TIMES16, PTX)
                else:
                    low, high = fold_codes(packed, scales, GROUPS == 2, PTX)
                acc = tl.dot(low, x_low, acc, out_dtype=tl.int32)
                acc = tl.dot(high, x_high, acc, out_dtype=tl.int32)
            else:
                if CENTERED:
                    low, high = center_codes(packed, factors, PTX)
                else:
                    low, high = unpack_codes(packed, TIMES16, PTX)
                partial = tl.dot(low, x_low, partial, out_dtype=tl.int32)
                if GROUPS == 2:
                    acc += (partial >> 4 if TIMES16 else partial) * (scales & 65535)[:, None]
                    partial = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
                if OFFSETS:
                    group = step * (GROUPS * S_STEP)
                    acc -= offset_product(z_ptrs + group, x_low)
                    acc -= offset_product(z_ptrs + (group + S_STEP if GROUPS == 2 else group), x_high)
                partial = tl.dot(high, x_high, partial, out_dtype=tl.int32)
        if not (PER_CHANNEL or FOLD):
            acc += (partial >> 4 if TIMES16 else partial) * (scales >> 16 if GROUPS == 2 else scales)[:, None]
        w_ptrs += BLOCKS * W_STEP
        x_ptrs += BLOCKS * PACK
    return acc


@triton.jit
def accumulate_int8(
    xq_ptr, xq_stride, qdata_ptr, rows_m, rows_n, K,
    PACK: tl.constexpr, TILED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    part, PARTS: tl.constexpr,
):  # fmt: skip
    """K loop over 8-bit codes, per channel; returns the unscaled int32 ``[BLOCK_N, BLOCK_M]``."""
    steps = tl.cdiv(K, PACK)
    pack_range = tl.arange(0, PACK)
    w_ptrs = qdata_ptr + weight_offsets(rows_n, steps * PACK, TILED, PACK)[:, None] + pack_range[None, :]
    x_ptrs = xq_ptr + rows_m.to(tl.int64)[None, :] * xq_stride + pack_range[:, None]
    first, last = part_of(steps, part, PARTS)
    if PARTS > 1:
        w_ptrs += first * (PACK * 64 if TILED else PACK)
        x_ptrs += first * PACK
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    for step in tl.range(first, last):
        x = load_activations(x_ptrs, step * PACK, K, PACK, EVEN_K)
        acc = tl.dot(tl.load(w_ptrs), x, acc, out_dtype=tl.int32)
        w_ptrs += PACK * 64 if TILED else PACK
        x_ptrs += PACK
    return acc


@triton.jit
def accumulate_tile(
    xq_ptr, xq_stride, qdata_ptr, scale_ptr, zero_ptr, rows_m, rows_n, K,
    GROUP_SIZE: tl.constexpr, PACK: tl.constexpr, WEIGHT_BITS: tl.constexpr, FOLD: tl.constexpr, TIMES16: tl.constexpr,
    ASYMMETRIC: tl.constexpr, TILED: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, part=0, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Integer accumulator of one tile, int32 ``[BLOCK_N, BLOCK_M]``, exact for every schedule.

    Args:
        xq_ptr: int8 activations ``[M, K]`` with row stride ``xq_stride`` and contiguous rows.
        qdata_ptr: uint8 ``[N, Kp/2]`` or int8 ``[N, Kp]``, plain or tiled.
        scale_ptr: uint8 or int16 ``[N, G]``, plain or tiled like ``qdata``.
        zero_ptr: int8 or int16 like the scales where ASYMMETRIC; not read otherwise.
        rows_m, rows_n: rows of this tile, ``[BLOCK_M]`` and ``[BLOCK_N]``, clamped into range.
        part, PARTS: the sum over this one of PARTS parts of K, each of a step or more; the parts' sums add up to the whole.
    """
    if WEIGHT_BITS == 8:
        acc = accumulate_int8(
            xq_ptr, xq_stride, qdata_ptr, rows_m, rows_n, K, PACK, TILED, EVEN_K, BLOCK_M, BLOCK_N, part, PARTS
        )
    else:
        acc = accumulate_int4(
            xq_ptr, xq_stride, qdata_ptr, scale_ptr, zero_ptr, rows_m, rows_n, K,
            GROUP_SIZE, PACK, FOLD, TIMES16, ASYMMETRIC, TILED, EVEN_K, PTX, BLOCK_M, BLOCK_N, part, PARTS,
        )  # fmt: skip
    if GROUP_SIZE == -1:
        if TIMES16:
            acc = acc >> 4
        # One scale per row is the same address plain or tiled.
        acc = acc * tl.load(scale_ptr + rows_n).to(tl.int32)[:, None]
    return acc


DEVICE_FUNCTIONS = (
    tile_position,
    unpack_codes,
    fold_codes,
    center_codes,
    load_factors,
    offset_product,
    load_scales,
    load_activations,
    weight_offsets,
    part_of,
    accumulate_int4,
    accumulate_int8,
    accumulate_tile,
    dequantize_tile,
    add_bias,
)


def device_source() -> str:
    """Source text of every device function, for embedding in generated Triton modules."""
    return "\n\n".join(inspect.getsource(function.fn) for function in DEVICE_FUNCTIONS)
