"""Gluon kernels of the W4A8 linear layer for more than 16 tokens: asynchronous wgmma with the weight in registers.

A ring of stages in shared memory is filled by the tensor memory accelerator (TMA), one stage per packing block of 128
input features: activations ``[BLOCK_M, 128]``, codes ``[BLOCK_N, 64]`` and their group scales ``[BLOCK_N]``. While the
tensor cores work on one block, the next one's codes are expanded in registers, where plain Triton would wait.

Two kernels over the same steps:

- ``gemm_specialized``: one producer warp fills the ring, the others compute; persistent. Fastest up to a few hundred
  tokens, where each block is short and barriers would cost more than the work.
- ``gemm_pipelined``: every block of threads fills its own ring, two of them per SM. Fastest above, where the epilogue of
  one block overlaps the loop of the other.

``SCALES`` says how group scales enter, all exact but the last: ``fold`` (into the int8 weight; scales up to 15),
``none`` (per channel, applied in the epilogue), ``accumulate`` (int32 partial sums per group, any uint8 scale) and
``float`` (fp32 scales, what other W4A8 kernels do; for comparison only).

Weights in groups of 32 and 64 have packing blocks of 64 features: a stage holds two of them, and two or four group scales a row.
Its products are four wgmma of 32 features each, in the order of the features.

``GATED`` other than ``none`` says that the first half of the weight's rows are gate rows, the second the up rows that belong
to them, and the output is ``silu(gate) * up`` or the like. Weights are stored as ever: a tile of BLOCK_N rows takes half of
them from each half of the weight.

With SPLIT_K > 1 the partial sums of a tile meet in ``partial_ptr``: the last one to arrive, by a counter that it resets,
adds the others to its own. Integer addition makes the order irrelevant and no buffer needs to be cleared.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .gluon_common import (
    add_block_groups,
    add_four,
    allow_next_kernel,
    block_barrier,
    blocks_of_group,
    copy_to_shared,
    fold_codes,
    fold_codes_of_two,
    load_tokens,
    packed_pieces,
    reinterpret_shared,
    scales_in_block,
    store_tile,
    tile_position,
    token_halves,
    unpack_times16,
    wait_for_previous_kernel,
)


@gluon.jit
def split_range(part, BLOCKS: gl.constexpr, SPLIT_K: gl.constexpr, UNROLL: gl.constexpr):
    """First and last block of one of SPLIT_K parts of K, in whole multiples of UNROLL."""
    STEPS: gl.constexpr = BLOCKS // UNROLL
    return (part * STEPS) // SPLIT_K * UNROLL, ((part + 1) * STEPS) // SPLIT_K * UNROLL


@gluon.jit
def load_weight_stage(
    w_desc, s_desc, ws, ss, bar, slot, tile_n, N, block, pred,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """Announce all bytes of a stage and start the copies of its codes and group scales."""
    TILES: gl.constexpr = BLOCK_N // 64
    SPAN: gl.constexpr = TILES if GATED == "none" else TILES // 2  # row tiles of each half
    GROUPS: gl.constexpr = scales_in_block(GROUP_SIZE)
    PIECES: gl.constexpr = packed_pieces(GROUP_SIZE)
    SCALE_BYTES: gl.constexpr = 0 if SCALES == "none" else BLOCK_N * GROUPS * (4 if SCALES == "float" else 1)
    CODE_BYTES: gl.constexpr = w_desc.block_shape[1] * PIECES
    mbarrier.expect(bar, BLOCK_M * 128 + BLOCK_N * CODE_BYTES + SCALE_BYTES, pred=pred)
    for r in gl.static_range(TILES):
        row = ((tile_n * SPAN + r % SPAN + r // SPAN * (N // 128)) * BLOCKS + block) * (64 * PIECES)
        for piece in gl.static_range(PIECES):
            rows = ws.index(slot * PIECES + piece).slice(r * 64, 64, 0)
            copy_to_shared(w_desc, [row + piece * 64, 0], bar, rows, pred=pred)
    if SCALES != "none":
        for g in gl.static_range(GROUPS):
            group = block // blocks_of_group(GROUP_SIZE) * GROUPS + g
            if GATED == "none":
                scales = ss.index(slot * GROUPS + g).slice(0, TILES, 0)
                copy_to_shared(s_desc, [tile_n * TILES, group, 0], bar, scales, pred=pred)
            else:  # both halves in one copy: alone, one of 64 bytes would make the next begin off a multiple of 128
                copy_to_shared(s_desc, [0, tile_n * SPAN, group, 0], bar, ss.index(slot * GROUPS + g), pred=pred)


@gluon.jit
def allocate_scales(s_desc, STAGES: gl.constexpr, GROUP_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, GATED: gl.constexpr):
    """Shared memory for the group scales of all stages."""
    SLOTS: gl.constexpr = STAGES * scales_in_block(GROUP_SIZE)
    SCALE_TILES: gl.constexpr = 2 if BLOCK_N == 64 else BLOCK_N // 64  # a copy must begin at a multiple of 128 bytes
    SHAPE: gl.constexpr = [SLOTS, SCALE_TILES, 1, 64] if GATED == "none" else [SLOTS, 2, SCALE_TILES // 2, 1, 64]
    return gl.allocate_shared_memory(s_desc.dtype, SHAPE, s_desc.layout)


@gluon.jit
def stage_scales(ss, slot, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """Group scales of one group of a stage, ``[BLOCK_N]``, as int32 (or fp32)."""
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS: gl.constexpr = 128 if BLOCK_N == 64 else BLOCK_N  # as in allocate_scales
    rows = reinterpret_shared(ss.index(slot), ss.dtype, [ROWS], LINEAR)
    if ROWS != BLOCK_N:
        rows = rows.slice(0, BLOCK_N, 0)
    scales = rows.load(LAYOUT)
    return scales if ss.dtype == gl.float32 else scales.to(gl.int32)


@gluon.jit
def multiply_stage(
    acc, stage, xs, ws, ss, full,
    SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr, INT8: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """Add one stage to ``acc``; on return all stages before it, and nothing else, are sure to have been read."""
    # The tensor cores read the expanded weight from registers while the next stage is expanded. Those are other registers
    # only if the loop is unrolled: without, sums were wrong on an H100.
    IN_FLIGHT: gl.constexpr = 2 * packed_pieces(GROUP_SIZE) if UNROLL > 1 else 0
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=4)
    slot = stage % STAGES
    mbarrier.wait(full.index(slot), (stage // STAGES) & 1)
    x = xs.index(slot)
    if INT8:
        acc = warpgroup_mma(ws.index(slot), x.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
    elif GROUP_SIZE < 128:
        GROUPS: gl.constexpr = scales_in_block(GROUP_SIZE)
        SUMS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
        ROWS: gl.constexpr = gl.SliceLayout(1, A) if SCALES == "fold" else SUMS
        first, second = ws.index(slot * 2).load(A), ws.index(slot * 2 + 1).load(A)
        s0 = stage_scales(ss, slot * GROUPS, ROWS, BLOCK_N)
        s1 = stage_scales(ss, slot * GROUPS + GROUPS // 2 - 1, ROWS, BLOCK_N)
        s2 = stage_scales(ss, slot * GROUPS + GROUPS // 2, ROWS, BLOCK_N)
        s3 = stage_scales(ss, slot * GROUPS + GROUPS - 1, ROWS, BLOCK_N)
        if SCALES == "fold":
            low, high = fold_codes_of_two(first, s0, s1)
            next_low, next_high = fold_codes_of_two(second, s2, s3)
            acc = add_four(acc, low, high, next_low, next_high, x)
            acc = warpgroup_mma_wait(IN_FLIGHT, deps=(acc,))
        else:
            low, high = unpack_times16(first)
            acc = add_block_groups(acc, low, high, x, 0, s0, s1, GROUP_SIZE, 4, LAYOUT)
            low, high = unpack_times16(second)
            acc = add_block_groups(acc, low, high, x, 64, s2, s3, GROUP_SIZE, 4, LAYOUT)
    else:
        x_low = x.slice(0, 64, 1).permute((1, 0))
        x_high = x.slice(64, 64, 1).permute((1, 0))
        packed = ws.index(slot).load(A)
        if SCALES == "fold":
            low, high = fold_codes(packed, stage_scales(ss, slot, gl.SliceLayout(1, A), BLOCK_N))
        else:
            low, high = unpack_times16(packed)
        if SCALES == "fold" or SCALES == "none":
            acc = warpgroup_mma(low, x_low, acc, is_async=True)
            acc = warpgroup_mma(high, x_high, acc, is_async=True)
            acc = warpgroup_mma_wait(IN_FLIGHT, deps=(acc,))
        else:
            part = gl.zeros([BLOCK_N, BLOCK_M], gl.int32, LAYOUT)
            part = warpgroup_mma(low, x_low, part, use_acc=False, is_async=True)
            part = warpgroup_mma(high, x_high, part, is_async=True)
            scales = stage_scales(ss, slot, gl.SliceLayout(1, LAYOUT), BLOCK_N)
            part = warpgroup_mma_wait(0, deps=(part,)) >> 4
            if SCALES == "float":
                part = part.to(gl.float32)
            acc = acc + part * gl.expand_dims(scales, 1)
    return acc


@gluon.jit
def finish_tile(
    acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr,
    tile, part, tile_m, tile_n, M, N,
    SCALES: gl.constexpr, SPLIT_K: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr, INT8: gl.constexpr,
    GATED: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Reduce over the parts of K, then the epilogue."""
    if SCALES == "none" and not INT8:
        acc = acc >> 4
    first, second = token_halves(tile_m, M, BLOCK_M)
    last = True
    if SPLIT_K > 1:
        n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
        m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT))
        ptrs = partial_ptr + n[:, None] * BLOCK_M + m[None, :]
        parts = tile.to(gl.int64) * SPLIT_K
        gl.store(ptrs + (parts + part) * (BLOCK_N * BLOCK_M), acc)
        block_barrier()
        arrived = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        last = arrived == SPLIT_K - 1
        if last:
            gl.store(counter_ptr + tile, 0)
            for other in gl.static_range(1, SPLIT_K):
                index = parts + (part + other) % SPLIT_K
                acc += gl.load(ptrs + index * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            store_tile(
                acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr,
                first, second, tile_n * BLOCK_N, M, N, SCALES == "none", DEQUANTIZE, HAS_BIAS, LAYOUT,
                BLOCK_M, BLOCK_N, WARPS, GATED, HAS_RESIDUAL,
            )  # fmt: skip
    else:
        store_tile(
            acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr,
            first, second, tile_n * BLOCK_N, M, N, SCALES == "none", DEQUANTIZE, HAS_BIAS, LAYOUT,
            BLOCK_M, BLOCK_N, WARPS, GATED, HAS_RESIDUAL,
        )  # fmt: skip


@gluon.jit
def produce(
    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUP_N: gl.constexpr, SPLIT_K: gl.constexpr, UNROLL: gl.constexpr, OVERLAP: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """The producer warp: fill the ring for every tile of this program, weights of the first stages before all else."""
    items = gl.cdiv(N, BLOCK_N) * gl.cdiv(M, BLOCK_M) * SPLIT_K
    first_item = gl.program_id(0)
    tile_m, tile_n = tile_position(first_item // SPLIT_K, M, N, BLOCK_M, BLOCK_N, GROUP_N)
    begin, end = split_range(first_item % SPLIT_K, BLOCKS, SPLIT_K, UNROLL)
    ahead = gl.minimum(end - begin, STAGES)
    for i in gl.static_range(STAGES):
        load_weight_stage(
            w_desc, s_desc, ws, ss, full.index(i), i, tile_n, N, begin + i, i < ahead,
            BLOCKS, SCALES, GROUP_SIZE, BLOCK_M, BLOCK_N, GATED,
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
            mbarrier.wait(empty.index(slot), ((stage // STAGES) & 1) ^ 1)
            load_weight_stage(
                w_desc, s_desc, ws, ss, full.index(slot), slot, tile_n, N, block, True,
                BLOCKS, SCALES, GROUP_SIZE, BLOCK_M, BLOCK_N, GATED,
            )  # fmt: skip
            load_tokens(x_desc, xs, full.index(slot), slot, first, second, block, True, BLOCK_M)
            stage += 1


@gluon.jit
def consume(
    xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, partial_ptr,
    counter_ptr, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, GROUP_N: gl.constexpr, SPLIT_K: gl.constexpr,
    UNROLL: gl.constexpr, OVERLAP: gl.constexpr, INT8: gl.constexpr, GATED: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
):  # fmt: skip
    """The computing warps: multiply the stages of every tile of this program and store it."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 32]
    )
    items = gl.cdiv(N, BLOCK_N) * gl.cdiv(M, BLOCK_M) * SPLIT_K
    if OVERLAP:
        wait_for_previous_kernel()
    stage = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile_m, tile_n = tile_position(item // SPLIT_K, M, N, BLOCK_M, BLOCK_N, GROUP_N)
        begin, end = split_range(item % SPLIT_K, BLOCKS, SPLIT_K, UNROLL)
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32 if SCALES == "float" else gl.int32, LAYOUT)
        for step in range(begin // UNROLL, end // UNROLL):
            for u in gl.static_range(UNROLL):
                acc = multiply_stage(
                    acc, stage + u, xs, ws, ss, full,
                    SCALES, GROUP_SIZE, STAGES, BLOCK_M, BLOCK_N, LAYOUT, INT8, UNROLL,
                )  # fmt: skip
                # The stage before this one has been read: its slot is free, unless it belongs to the tile before.
                free = (step * UNROLL + u) != begin
                mbarrier.arrive(empty.index((stage + u + STAGES - 1) % STAGES), count=1, pred=free)
            stage += UNROLL
        if SCALES == "fold" or SCALES == "none":
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
        finish_tile(
            acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr,
            item // SPLIT_K, item % SPLIT_K, tile_m, tile_n, M, N,
            SCALES, SPLIT_K, DEQUANTIZE, HAS_BIAS, BLOCK_M, BLOCK_N, WARPS, LAYOUT, INT8, GATED, HAS_RESIDUAL,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def gemm_specialized(
    x_desc, w_desc, s_desc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, partial_ptr,
    counter_ptr, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, DEQUANTIZE: gl.constexpr,
    HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP_N: gl.constexpr,
    SPLIT_K: gl.constexpr, UNROLL: gl.constexpr, OVERLAP: gl.constexpr, INT8: gl.constexpr, GATED: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """``out[m, n]``, ``[M, N]`` (gated: ``[M, N/2]``), with a producer warp and ``num_warps`` computing warps; see the module."""
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], x_desc.layout)
    PIECES: gl.constexpr = packed_pieces(GROUP_SIZE)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES * PIECES, BLOCK_N, w_desc.block_shape[1]], w_desc.layout)
    ss = allocate_scales(s_desc, STAGES, GROUP_SIZE, BLOCK_N, GATED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    if OVERLAP:
        allow_next_kernel()
    WARPS: gl.constexpr = gl.num_warps()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr,
                    partial_ptr, counter_ptr, M, N, BLOCKS, SCALES, DEQUANTIZE, HAS_BIAS, BLOCK_M, BLOCK_N, WARPS, STAGES,
                    GROUP_N, SPLIT_K, UNROLL, OVERLAP, INT8, GATED, HAS_RESIDUAL, GROUP_SIZE,
                ),
            ),
            (
                produce,
                (
                    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, M, N, BLOCKS, SCALES, GROUP_SIZE, BLOCK_M,
                    BLOCK_N, STAGES, GROUP_N, SPLIT_K, UNROLL, OVERLAP, GATED,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def gemm_pipelined(
    x_desc, w_desc, s_desc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, partial_ptr,
    counter_ptr, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, DEQUANTIZE: gl.constexpr,
    HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP_N: gl.constexpr,
    SPLIT_K: gl.constexpr, UNROLL: gl.constexpr, OVERLAP: gl.constexpr, INT8: gl.constexpr, GATED: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """``out[m, n]``, ``[M, N]`` (gated: ``[M, N/2]``), one tile a program, every warp alike; see the module."""
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 32]
    )
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], x_desc.layout)
    PIECES: gl.constexpr = packed_pieces(GROUP_SIZE)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES * PIECES, BLOCK_N, w_desc.block_shape[1]], w_desc.layout)
    ss = allocate_scales(s_desc, STAGES, GROUP_SIZE, BLOCK_N, GATED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    if OVERLAP:
        allow_next_kernel()
    tile, part = gl.program_id(0) // SPLIT_K, gl.program_id(0) % SPLIT_K
    tile_m, tile_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_N)
    begin, end = split_range(part, BLOCKS, SPLIT_K, UNROLL)
    for i in gl.static_range(STAGES - 1):
        load_weight_stage(
            w_desc, s_desc, ws, ss, full.index(i), i, tile_n, N, begin + i, begin + i < end,
            BLOCKS, SCALES, GROUP_SIZE, BLOCK_M, BLOCK_N, GATED,
        )  # fmt: skip
    if OVERLAP:
        wait_for_previous_kernel()
    first, second = token_halves(tile_m, M, BLOCK_M)
    for i in gl.static_range(STAGES - 1):
        load_tokens(x_desc, xs, full.index(i), i, first, second, begin + i, begin + i < end, BLOCK_M)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32 if SCALES == "float" else gl.int32, LAYOUT)
    for step in range(begin // UNROLL, end // UNROLL):
        for u in gl.static_range(UNROLL):
            stage = step * UNROLL + u - begin
            acc = multiply_stage(
                acc, stage, xs, ws, ss, full, SCALES, GROUP_SIZE, STAGES, BLOCK_M, BLOCK_N, LAYOUT, INT8, UNROLL
            )
            # The slot of the stage before this one is free now.
            ahead = stage + STAGES - 1
            slot, more = ahead % STAGES, begin + ahead < end
            load_weight_stage(
                w_desc, s_desc, ws, ss, full.index(slot), slot, tile_n, N, begin + ahead, more,
                BLOCKS, SCALES, GROUP_SIZE, BLOCK_M, BLOCK_N, GATED,
            )  # fmt: skip
            load_tokens(x_desc, xs, full.index(slot), slot, first, second, begin + ahead, more, BLOCK_M)
    if SCALES == "fold" or SCALES == "none":
        acc = warpgroup_mma_wait(0, deps=(acc,))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
    finish_tile(
        acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr,
        tile, part, tile_m, tile_n, M, N,
        SCALES, SPLIT_K, DEQUANTIZE, HAS_BIAS, BLOCK_M, BLOCK_N, WARPS, LAYOUT, INT8, GATED, HAS_RESIDUAL,
    )  # fmt: skip
