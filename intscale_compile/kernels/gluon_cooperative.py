"""Gluon kernel of the W4A8 linear layer for many tokens: a producer warp and two or three consumers that share activations.

A stage of the ring is one packing block of 128 input features: activations ``[BLOCK_M, 128]``, which all consumers read, and
codes with their group scales ``[BLOCK_N]``, of which each consumer (a warpgroup) has its own rows. While one consumer expands
codes in registers, the tensor cores work for another; each waits for its own wgmma once a stage, since ptxas serializes wgmma
that are left in flight across stages beside ``setmaxnreg``. With 64 rows and 256 tokens a consumer reads half the codes and
scales for each wgmma that a square tile of 128 would. Three consumers of 64 rows and 128 tokens (BLOCK_N 192) keep the tensor
cores busier than two where a tile has to be small, or where each holds two sums.

With ``TMA_STORE`` the epilogue writes 16-bit results to shared memory, from where the tensor memory accelerator takes them while
the next tile is multiplied; scales are fetched before the loop, and so is a residual, to where the results will be. Without, and
for other outputs, results are stored as in ``gluon_gemm``'s kernels.

``SCALES`` is as in ``gluon_gemm``. ``accumulate`` drains an int32 partial sum after every group; the other consumers' wgmma
run meanwhile. The accumulator is that of every other kernel, bit for bit.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gluon_common import (
    allow_next_kernel,
    blocks_of_group,
    copy_to_shared,
    load_tokens,
    packed_pieces,
    scales_in_block,
    store_tile,
    tile_position,
    token_halves,
    wait_for_previous_kernel,
)
from .gluon_epilogue import half_scales, start_residual, store_half, sum_parts
from .gluon_gemm import split_range
from .gluon_stage import copied_scales, multiply_ahead, multiply_half


@gluon.jit
def load_weights(
    w_desc, s_desc, ws, ss, bar, slot, row_tile, block, pred,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GATED: gl.constexpr, row_tiles,
):  # fmt: skip
    """Announce all bytes of a stage and start the copies of the codes and group scales of all consumers.

    ``row_tile`` is the first of the tile's rows, in packing tiles of 64 rows. ``ws`` has a slot for each consumer and stage.
    Gated, it is the first of the gate rows, the up rows are ``row_tiles`` tiles behind them, and a consumer's rows are 8 of
    each in turns: both values of an output are then registers of one thread.
    """
    ROWS: gl.constexpr = ws.shape[1]
    CONSUMERS: gl.constexpr = BLOCK_N // ROWS
    GROUPS: gl.constexpr = scales_in_block(GROUP_SIZE)
    PIECES: gl.constexpr = packed_pieces(GROUP_SIZE)
    WIDTH: gl.constexpr = 0 if SCALES == "none" else 4 if SCALES == "float" else 1
    SCALE_BYTES: gl.constexpr = copied_scales(BLOCK_N) * GROUPS * WIDTH
    CODE_BYTES: gl.constexpr = w_desc.block_shape[1] * PIECES
    mbarrier.expect(bar, BLOCK_M * 128 + BLOCK_N * CODE_BYTES + SCALE_BYTES, pred=pred)
    COPY: gl.constexpr = w_desc.block_shape[0]  # rows
    for r in gl.static_range(BLOCK_N // COPY):
        if GATED == "none":
            row = ((row_tile + r) * BLOCKS + block) * (64 * PIECES)
        else:
            row = ((row_tile + r % 2 * row_tiles) * BLOCKS + block) * (64 * PIECES) + r // 2 * COPY
        for piece in gl.static_range(PIECES):
            rows = ws.index((slot * CONSUMERS + r * COPY // ROWS) * PIECES + piece).slice(r * COPY % ROWS, COPY, 0)
            copy_to_shared(w_desc, [row + piece * 64, 0], bar, rows, pred=pred)
    if SCALES != "none":
        for g in gl.static_range(GROUPS):
            group = block // blocks_of_group(GROUP_SIZE) * GROUPS + g
            if GATED == "none":
                copy_to_shared(s_desc, [row_tile, group, 0], bar, ss.index(slot * GROUPS + g), pred=pred)
            else:
                copy_to_shared(s_desc, [0, row_tile, group, 0], bar, ss.index(slot * GROUPS + g), pred=pred)


@gluon.jit
def consume_half(
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, xs, ws, ss, ys, full, empty, residual_bars, out_desc, residual_desc,
    out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP_N: gl.constexpr, SPLIT_K: gl.constexpr, UNROLL: gl.constexpr,
    OVERLAP: gl.constexpr, INT8: gl.constexpr, GATED: gl.constexpr, HAS_RESIDUAL: gl.constexpr, TMA_STORE: gl.constexpr,
    GROUP_SIZE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """One consumer: the products of its rows with every stage of every tile of this program, and their epilogue."""
    ROWS: gl.constexpr = BLOCK_N // CONSUMERS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M if BLOCK_M < 128 else 128, 32]
    )
    EARLY: gl.constexpr = SCALES == "fold" or SCALES == "none"  # with two sums there are no registers to keep scales in
    items = gl.cdiv(N, BLOCK_N) * gl.cdiv(M, BLOCK_M) * SPLIT_K
    if OVERLAP:
        wait_for_previous_kernel()
    bar = residual_bars.index(CONSUMER)
    stage = 0
    phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile_m, tile_n = tile_position(item // SPLIT_K, M, N, BLOCK_M, BLOCK_N, GROUP_N)
        begin, end = split_range(item % SPLIT_K, BLOCKS, SPLIT_K, UNROLL)
        first, second = token_halves(tile_m, M, BLOCK_M)
        n0 = tile_n * BLOCK_N + CONSUMER * ROWS
        if TMA_STORE and EARLY:
            factor, row_scale, token_scale, bias = half_scales(
                scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, first, second, n0, M, N,
                SCALES, HAS_BIAS, BLOCK_M, ROWS, LAYOUT, GATED,
            )  # fmt: skip
        if TMA_STORE and HAS_RESIDUAL and SPLIT_K == 1:
            start_residual(residual_desc, ys, bar, first, second, n0, CONSUMER, BLOCK_M, ROWS)
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32 if SCALES == "float" else gl.int32, LAYOUT)
        for _ in range(begin // UNROLL, end // UNROLL):
            if AHEAD:
                acc = multiply_ahead(
                    acc, stage, xs, ws, ss, full, empty, CONSUMER, CONSUMERS,
                    SCALES, GROUP_SIZE, ROWS, LAYOUT, GATED, STAGES, UNROLL,
                )  # fmt: skip
            else:
                for u in gl.static_range(UNROLL):
                    slot = (stage + u) % STAGES
                    mbarrier.wait(full.index(slot), ((stage + u) // STAGES) & 1)
                    acc = multiply_half(
                        acc, slot, xs, ws, ss, empty, CONSUMER, CONSUMERS,
                        SCALES, GROUP_SIZE, ROWS, LAYOUT, INT8, GATED,
                    )  # fmt: skip
            stage += UNROLL
        last = True
        if SPLIT_K > 1:
            acc, last = sum_parts(
                acc, partial_ptr, counter_ptr, item // SPLIT_K * CONSUMERS + CONSUMER, item % SPLIT_K,
                SPLIT_K, BLOCK_M, ROWS, LAYOUT,
            )  # fmt: skip
        if last:
            if TMA_STORE:
                if not EARLY:
                    factor, row_scale, token_scale, bias = half_scales(
                        scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, first, second, n0, M, N,
                        SCALES, HAS_BIAS, BLOCK_M, ROWS, LAYOUT, GATED,
                    )  # fmt: skip
                if HAS_RESIDUAL and SPLIT_K > 1:
                    start_residual(residual_desc, ys, bar, first, second, n0, CONSUMER, BLOCK_M, ROWS)
                if HAS_RESIDUAL:
                    mbarrier.wait(bar, phase)
                    phase ^= 1
                store_half(
                    acc, out_desc, ys, factor, row_scale, token_scale, bias, first, second, n0, CONSUMER,
                    SCALES, HAS_BIAS, BLOCK_M, ROWS, LAYOUT, INT8, HAS_RESIDUAL, GATED,
                )  # fmt: skip
            else:
                if SCALES == "none" and not INT8:
                    acc = acc >> 4
                store_tile(
                    acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr,
                    first, second, n0, M, N, SCALES == "none", DEQUANTIZE, HAS_BIAS, LAYOUT,
                    BLOCK_M, ROWS, 4, "none", HAS_RESIDUAL,
                )  # fmt: skip
    if TMA_STORE:
        tma.store_wait(0)


@gluon.jit
def produce_shared(
    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUP_N: gl.constexpr, SPLIT_K: gl.constexpr, UNROLL: gl.constexpr, OVERLAP: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """The producer warp: fill the ring for every tile of this program, weights of the first stages before all else."""
    SPAN: gl.constexpr = BLOCK_N // 64 if GATED == "none" else 1  # packing tiles of rows, gated those of the gate
    items = gl.cdiv(N, BLOCK_N) * gl.cdiv(M, BLOCK_M) * SPLIT_K
    first_item = gl.program_id(0)
    tile_m, tile_n = tile_position(first_item // SPLIT_K, M, N, BLOCK_M, BLOCK_N, GROUP_N)
    begin, end = split_range(first_item % SPLIT_K, BLOCKS, SPLIT_K, UNROLL)
    ahead = gl.minimum(end - begin, STAGES)
    for i in gl.static_range(STAGES):
        load_weights(
            w_desc, s_desc, ws, ss, full.index(i), i, tile_n * SPAN, begin + i, i < ahead,
            BLOCKS, SCALES, GROUP_SIZE, BLOCK_M, BLOCK_N, GATED, N // 128,
        )  # fmt: skip
    if OVERLAP:
        wait_for_previous_kernel()
    first, second = token_halves(tile_m, M, BLOCK_M)
    for i in gl.static_range(STAGES):
        load_tokens(x_desc, xs, full.index(i), i, first, second, begin + i, i < ahead, BLOCK_M)
    stage = ahead
    for item in range(first_item, items, gl.num_programs(0)):
        tile_m, tile_n = tile_position(item // SPLIT_K, M, N, BLOCK_M, BLOCK_N, GROUP_N)
        begin, end = split_range(item % SPLIT_K, BLOCKS, SPLIT_K, UNROLL)
        first, second = token_halves(tile_m, M, BLOCK_M)
        done = gl.where(item == first_item, ahead, 0)
        for block in range(begin + done, end):
            slot = stage % STAGES
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), ((stage // STAGES) & 1) ^ 1)
            load_weights(
                w_desc, s_desc, ws, ss, bar, slot, tile_n * SPAN, block, True,
                BLOCKS, SCALES, GROUP_SIZE, BLOCK_M, BLOCK_N, GATED, N // 128,
            )  # fmt: skip
            load_tokens(x_desc, xs, bar, slot, first, second, block, True, BLOCK_M)
            stage += 1


@gluon.jit(do_not_specialize=["M"])
def gemm_cooperative(
    x_desc, w_desc, s_desc, out_desc, residual_desc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr,
    residual_ptr, partial_ptr, counter_ptr, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, DEQUANTIZE: gl.constexpr,
    HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP_N: gl.constexpr,
    SPLIT_K: gl.constexpr, UNROLL: gl.constexpr, OVERLAP: gl.constexpr, INT8: gl.constexpr, GATED: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, TMA_STORE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """``out[m, n]``, ``[M, N]``; persistent. Launched with 4 warps: one consumer; the others and the producer are beside it.

    Gated (``[M, N/2]``) with BLOCK_N 128 and TMA_STORE only.

    ``TMA_STORE`` (for 16-bit outputs whose rows are a multiple of 16 bytes): by ``out_desc`` and ``residual_desc``
    instead of the pointers.
    """
    gl.static_assert(GATED == "none" or (TMA_STORE and BLOCK_N == 128))
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], x_desc.layout)
    CONSUMERS: gl.constexpr = 3 if BLOCK_N == 192 else 2
    PIECES: gl.constexpr = STAGES * CONSUMERS * packed_pieces(GROUP_SIZE)
    ws = gl.allocate_shared_memory(gl.int8, [PIECES, BLOCK_N // CONSUMERS, w_desc.block_shape[1]], w_desc.layout)
    SCALES_AHEAD: gl.constexpr = STAGES * scales_in_block(GROUP_SIZE)
    if GATED == "none":
        ss = gl.allocate_shared_memory(s_desc.dtype, [SCALES_AHEAD, s_desc.block_shape[0], 1, 64], s_desc.layout)
    else:
        ss = gl.allocate_shared_memory(s_desc.dtype, [SCALES_AHEAD, 2, 1, 1, 64], s_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    ys = full  # not read without TMA_STORE
    residual_bars = empty
    if TMA_STORE:
        COLUMNS: gl.constexpr = out_desc.block_shape[1]
        WIDTH: gl.constexpr = BLOCK_N if GATED == "none" else BLOCK_N // 2
        ys = gl.allocate_shared_memory(out_desc.dtype, [WIDTH // COLUMNS, BLOCK_M, COLUMNS], out_desc.layout)
        if HAS_RESIDUAL:
            residual_bars = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
            for i in gl.static_range(CONSUMERS):
                mbarrier.init(residual_bars.index(i), count=1)
    if OVERLAP:
        allow_next_kernel()
    gl.warp_specialize(
        [
            (
                consume_half,
                (
                    part, CONSUMERS, xs, ws, ss, ys, full, empty, residual_bars, out_desc, residual_desc, out_ptr, scale_ptr,
                    row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr, M, N, BLOCKS, SCALES,
                    DEQUANTIZE, HAS_BIAS, BLOCK_M, BLOCK_N, STAGES, GROUP_N, SPLIT_K, UNROLL, OVERLAP, INT8, GATED,
                    HAS_RESIDUAL, TMA_STORE, GROUP_SIZE, AHEAD,
                ),
            )
            if part < CONSUMERS
            else (
                produce_shared,
                (
                    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, M, N, BLOCKS, SCALES, GROUP_SIZE, BLOCK_M, BLOCK_N,
                    STAGES, GROUP_N, SPLIT_K, UNROLL, OVERLAP, GATED,
                ),
            )
            for part in ((0, 1, 2) if CONSUMERS == 2 else (0, 1, 2, 3))
        ],
        [4, 1] if CONSUMERS == 2 else [4, 4, 1],
        [240, 24] if CONSUMERS == 2 else [160, 160, 32],
    )  # fmt: skip
