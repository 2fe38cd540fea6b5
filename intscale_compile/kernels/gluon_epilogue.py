"""Epilogue of the cooperative Gluon kernel: sums of parts of K, scales, residual, results by the tensor memory accelerator.

A consumer has ``ROWS`` rows of the product and ``BLOCK_M`` tokens. Its results are written to shared memory with tokens as rows
(``stmatrix`` transposes them), 64 features a piece, from where they are copied to memory without any register.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .gluon_common import block_barrier, copy_to_global, copy_to_shared, gate_activation, tile_tokens


@gluon.jit
def half_scales(
    scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, first, second, n0, M, N,
    SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """What the epilogue multiplies and adds: by row (factors of the sums, fp32 scales, bias), and fp32 scales by token.

    Gated, a consumer's rows are 8 of gate and of up in turns, as ``gluon_cooperative.load_weights`` copies them.
    """
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    n = n0 + row
    if GATED != "none":
        n = n0 // 2 + row // 16 * 8 + row % 8 + row // 8 % 2 * (N // 2)
    TOKENS: gl.constexpr = gl.BlockedLayout([BLOCK_M // 128], [32], [4], [0])
    m = tile_tokens(first, second, BLOCK_M, TOKENS)
    row_scale = gl.load(row_scale_ptr + n, mask=n < N, other=0.0)
    token_scale = gl.load(token_scale_ptr + m, mask=m < M, other=0.0)
    factor = row_scale
    bias = row_scale
    if SCALES == "none":
        factor = gl.load(scale_ptr + n, mask=n < N, other=0).to(gl.int32)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    return factor, row_scale, token_scale, bias


@gluon.jit
def sum_parts(
    acc, partial_ptr, counter_ptr, tile, part,
    SPLIT_K: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """``acc`` with those of the other parts of K added, and whether this part was the last to arrive: only then they are.

    Partial sums lie as the warps hold them, so that each of their accesses is to whole lines.
    """
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    ptrs = partial_ptr + (m % 8 + n * 8 + m // 8 * (8 * ROWS))
    parts = tile.to(gl.int64) * SPLIT_K
    gl.store(ptrs + (parts + part) * (ROWS * BLOCK_M), acc)
    block_barrier()
    last = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if last:
        gl.store(counter_ptr + tile, 0)
        for other in range(1, SPLIT_K):  # unrolled, the sums of all parts would be on their way at once
            index = parts + (part + other) % SPLIT_K
            acc += gl.load(ptrs + index * (ROWS * BLOCK_M), cache_modifier=".cg")
    return acc, last


@gluon.jit
def start_residual(
    residual_desc, ys, bar, first, second, n0, CONSUMER: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr
):
    """Copy the residual of a consumer's half of a tile to where its results will be, when those of the tile before have left."""
    HALF: gl.constexpr = BLOCK_M // 2
    PIECES: gl.constexpr = ROWS // 64
    tma.store_wait(0)
    mbarrier.expect(bar, BLOCK_M * ROWS * 2)
    for p in gl.static_range(PIECES):
        y = ys.index(CONSUMER * PIECES + p)
        copy_to_shared(residual_desc, [first, n0 + p * 64], bar, y.slice(0, HALF, 0))
        copy_to_shared(residual_desc, [second, n0 + p * 64], bar, y.slice(HALF, HALF, 0))


@gluon.jit
def store_piece(y, out_desc, ys, first, second, n, HAS_RESIDUAL: gl.constexpr, BLOCK_M: gl.constexpr):
    """Store rows ``y`` of the product, ``[64 or 32, BLOCK_M]``, as columns of the output, by way of shared memory ``ys``."""
    HALF: gl.constexpr = BLOCK_M // 2
    turned = ys.permute((1, 0))
    if HAS_RESIDUAL:
        y = (y.to(gl.float32) + turned.load(y.type.layout).to(gl.float32)).to(ys.dtype)
    turned.store(y)
    fence_async_shared()
    copy_to_global(out_desc, [first, n], ys.slice(0, HALF, 0))
    copy_to_global(out_desc, [second, n], ys.slice(HALF, HALF, 0))


@gluon.jit
def store_half(
    acc, out_desc, ys, factor, row_scale, token_scale, bias, first, second, n0, CONSUMER: gl.constexpr,
    SCALES: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
    INT8: gl.constexpr, HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Epilogue of a consumer's half of a tile; its copies to memory are under way on return. Values as of ``store_tile``."""
    if SCALES == "none":
        acc = (acc if INT8 else acc >> 4) * factor[:, None]
    y = acc.to(gl.float32) * gl.convert_layout(token_scale, gl.SliceLayout(0, LAYOUT))[None, :] * row_scale[:, None]
    if HAS_BIAS:
        y = y + bias[:, None]
    if GATED != "none":
        gate, up = gl.split(gl.permute(gl.reshape(y, [4, 2, 8, BLOCK_M]), (0, 2, 3, 1)))  # registers of one thread
        y = gl.reshape(gate_activation(gate, GATED) * up, [32, BLOCK_M])
    y = y.to(ys.dtype)
    if not HAS_RESIDUAL:
        tma.store_wait(0)  # with a residual, start_residual has waited
    if GATED != "none":
        store_piece(y, out_desc, ys.index(CONSUMER), first, second, n0 // 2, False, BLOCK_M)
    elif ROWS == 64:
        store_piece(y, out_desc, ys.index(CONSUMER), first, second, n0, HAS_RESIDUAL, BLOCK_M)
    else:
        low, high = gl.split(gl.permute(gl.reshape(y, [2, 64, BLOCK_M]), (1, 2, 0)))
        store_piece(low, out_desc, ys.index(2 * CONSUMER), first, second, n0, HAS_RESIDUAL, BLOCK_M)
        store_piece(high, out_desc, ys.index(2 * CONSUMER + 1), first, second, n0 + 64, HAS_RESIDUAL, BLOCK_M)
