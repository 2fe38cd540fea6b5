"""Gluon kernels of the grouped W4A8 linear layer (mixtures of experts): the dense ones, with tiles found from the offsets.

Rows of ``xq`` are sorted by expert. Every program reads the offsets itself and finds the expert, the rows and the output
features of each of its tiles; the host never waits for them. Rows after the last offset belong to no expert and get zeros: a tile
of them has no stages. A tile may read rows of the next expert, whose sums are not stored.

- ``grouped_cooperative``: two consumers that share activations, as ``gluon_cooperative``; for many rows an expert.
- ``grouped_decode``: a stream of weights, as ``gluon_decode``; for few rows an expert.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_common import (
    load_tokens,
    packed_pieces,
    scales_in_block,
    tile_position,
    tile_tokens,
    wait_for_previous_kernel,
)
from .gluon_cooperative import load_weights
from .gluon_decode import SPLIT, allocate_weights, copy_weights, load_activation_stage, multiply_round
from .gluon_stage import multiply_half


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def group_tiles(offsets_ptr, rows, experts, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, WARPS: gl.constexpr):
    """First rows, end rows and number of row tiles up to and with each group, ``[GROUPS]`` each; every warp holds all.

    Group ``e`` is the rows of expert ``e``; group ``experts`` the rows after the last offset. Later ones are empty.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([GROUPS // 32], [32], [WARPS], [0])
    index = gl.arange(0, GROUPS, layout=LAYOUT)
    starts = gl.load(offsets_ptr + index - 1, mask=(index > 0) & (index <= experts), other=0)
    starts = gl.where(index > experts, rows, gl.maximum(gl.minimum(starts, rows), 0))
    ends = gl.minimum(gl.load(offsets_ptr + index, mask=index < experts, other=rows), rows)
    tiles = (gl.maximum(ends - starts, 0) + (BLOCK_M - 1)) // BLOCK_M
    return starts, ends, gl.associative_scan(tiles, 0, _add)


@gluon.jit
def find_tile(
    starts, ends, through, item, N,
    GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """``(group, first row of the tile, start and end row of the group, tile_n)`` of a tile number.

    Tiles of one group follow one another; within it GROUP_N columns of tiles share their weights in L2.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([GROUPS // 32], [32], [WARPS], [0])
    tiles_n = gl.cdiv(N, BLOCK_N)
    group = gl.sum((through <= item // tiles_n).to(gl.int32), 0)
    own = gl.arange(0, GROUPS, layout=LAYOUT) == group
    start = gl.sum(gl.where(own, starts, 0), 0)
    end = gl.sum(gl.where(own, ends, 0), 0)
    last = gl.sum(gl.where(own, through, 0), 0)
    before = last - (end - start + (BLOCK_M - 1)) // BLOCK_M
    tile_m, tile_n = tile_position(item - before * tiles_n, end - start, N, BLOCK_M, BLOCK_N, GROUP_N)
    return group, start + tile_m * BLOCK_M, start, end, tile_n


@gluon.jit
def tile_halves(first, rows, BLOCK_M: gl.constexpr):
    """First rows of the halves of a tile that begins at ``first``, as ``token_halves``: none reaches behind ``rows``."""
    last = gl.maximum(rows - BLOCK_M // 2, 0)
    return gl.minimum(first, last), gl.minimum(first + BLOCK_M // 2, last)


@gluon.jit
def store_group_tile(
    acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, row_index_ptr, out_index_ptr,
    first, second, start, end, n0, N, group, experts, row_tiles,
    CHANNEL_SCALE: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, LAYOUT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Epilogue of one tile: int32 ``acc`` ``[BLOCK_N, BLOCK_M]`` to those rows of ``out`` that lie in ``start`` to ``end``.

    Row scales, bias and channel scales are those of the expert ``group``; rows of group ``experts``, for which ``acc`` is 0, get
    zeros. ``row_index_ptr`` (or None) gives the token of a row, ``out_index_ptr`` (or None) the row of the output.
    """
    alive = group < experts
    expert = gl.minimum(group, experts - 1)
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    m = tile_tokens(first, second, BLOCK_M, gl.SliceLayout(0, LAYOUT))
    own = (m >= start) & (m < end) & alive
    if CHANNEL_SCALE:
        acc = acc * gl.load(scale_ptr + expert * (row_tiles * 64) + n, mask=n < N, other=0).to(gl.int32)[:, None]
    if DEQUANTIZE:
        if row_index_ptr is not None:
            m = gl.load(row_index_ptr + m, mask=own, other=0)
        row_scale = gl.load(row_scale_ptr + expert * N + n, mask=n < N, other=0.0)
        token_scale = gl.load(token_scale_ptr + m, mask=own, other=0.0)
        y = acc.to(gl.float32) * token_scale[None, :] * row_scale[:, None]
        if HAS_BIAS:
            y = y + gl.load(bias_ptr + expert * N + n, mask=(n < N) & alive, other=0.0).to(gl.float32)[:, None]
    else:
        y = acc
    y = y.to(out_ptr.dtype.element_ty)
    RUN: gl.constexpr = 8 if BLOCK_N >= 64 else BLOCK_N // 8
    ACROSS: gl.constexpr = BLOCK_N // RUN if BLOCK_N // RUN < 32 else 32
    ROWS: gl.constexpr = gl.BlockedLayout([RUN, 1], [ACROSS, 32 // ACROSS], [1, WARPS], [0, 1])
    y = gl.convert_layout(y, ROWS)
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ROWS))
    m = tile_tokens(first, second, BLOCK_M, gl.SliceLayout(0, ROWS))
    own = (m >= start) & (m < end)
    if out_index_ptr is not None:
        m = gl.load(out_index_ptr + m, mask=own, other=0)
    gl.store(out_ptr + m[None, :].to(gl.int64) * N + n[:, None], y, mask=own[None, :] & (n < N)[:, None])


@gluon.jit
def consume_rows(
    CONSUMER: gl.constexpr, xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr,
    offsets_ptr, row_index_ptr, out_index_ptr, rows, experts, N, row_tiles,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP_N: gl.constexpr, UNROLL: gl.constexpr,
    OVERLAP: gl.constexpr, INT8: gl.constexpr, GROUP_SIZE: gl.constexpr,
):  # fmt: skip
    """One consumer of ``grouped_cooperative``: its half of the output features of every tile of this program."""
    ROWS: gl.constexpr = BLOCK_N // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M if BLOCK_M < 128 else 128, 32]
    )
    if OVERLAP:
        wait_for_previous_kernel()
    starts, ends, through = group_tiles(offsets_ptr, rows, experts, GROUPS, BLOCK_M, 4)
    stage = 0
    for item in range(gl.program_id(0), gl.max(through, 0) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        group, first, start, end, tile_n = find_tile(
            starts, ends, through, item, N, GROUPS, BLOCK_M, BLOCK_N, GROUP_N, 4
        )
        acc = gl.zeros([ROWS, BLOCK_M], gl.int32, LAYOUT)
        for _ in range(gl.where(group < experts, BLOCKS // UNROLL, 0)):
            for u in gl.static_range(UNROLL):
                slot = (stage + u) % STAGES
                mbarrier.wait(full.index(slot), ((stage + u) // STAGES) & 1)
                acc = multiply_half(
                    acc, slot, xs, ws, ss, empty, CONSUMER, 2, SCALES, GROUP_SIZE, ROWS, LAYOUT, INT8, "none"
                )
            stage += UNROLL
        if SCALES == "none" and not INT8:
            acc = acc >> 4
        first, second = tile_halves(first, rows, BLOCK_M)
        store_group_tile(
            acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, row_index_ptr, out_index_ptr,
            first, second, start, end, (tile_n * 2 + CONSUMER) * ROWS, N, group, experts, row_tiles,
            SCALES == "none", DEQUANTIZE, HAS_BIAS, LAYOUT, BLOCK_M, ROWS, 4,
        )  # fmt: skip


@gluon.jit
def produce_rows(
    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, offsets_ptr, rows, experts, N, row_tiles,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GROUP_N: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The producer warp of ``grouped_cooperative``: fill the ring for every tile of this program."""
    if OVERLAP:
        wait_for_previous_kernel()
    starts, ends, through = group_tiles(offsets_ptr, rows, experts, GROUPS, BLOCK_M, 1)
    stage = 0
    for item in range(gl.program_id(0), gl.max(through, 0) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        group, first, start, end, tile_n = find_tile(
            starts, ends, through, item, N, GROUPS, BLOCK_M, BLOCK_N, GROUP_N, 1
        )
        first, second = tile_halves(first, rows, BLOCK_M)
        row_tile = group * row_tiles + tile_n * (BLOCK_N // 64)
        for block in range(gl.where(group < experts, BLOCKS, 0)):
            slot = stage % STAGES
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), ((stage // STAGES) & 1) ^ 1)
            load_weights(
                w_desc, s_desc, ws, ss, bar, slot, row_tile, block, True,
                BLOCKS, SCALES, GROUP_SIZE, BLOCK_M, BLOCK_N, "none", 0,
            )  # fmt: skip
            load_tokens(x_desc, xs, bar, slot, first, second, block, True, BLOCK_M)
            stage += 1


@gluon.jit(do_not_specialize=["rows"])
def grouped_cooperative(
    x_desc, w_desc, s_desc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, offsets_ptr, row_index_ptr,
    out_index_ptr, rows, experts, N, row_tiles,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, DEQUANTIZE: gl.constexpr,
    HAS_BIAS: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    GROUP_N: gl.constexpr, UNROLL: gl.constexpr, OVERLAP: gl.constexpr, INT8: gl.constexpr,
):  # fmt: skip
    """``out`` ``[rows, N]``; persistent. Launched with 4 warps: one consumer; the other and the producer are beside it.

    ``row_tiles`` are packing tiles of 64 rows of one expert's weight. GROUPS is a power of 2 above ``experts``, at least 32.
    """
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], x_desc.layout)
    PIECES: gl.constexpr = STAGES * 2 * packed_pieces(GROUP_SIZE)
    ws = gl.allocate_shared_memory(gl.int8, [PIECES, BLOCK_N // 2, w_desc.block_shape[1]], w_desc.layout)
    SCALES_AHEAD: gl.constexpr = STAGES * scales_in_block(GROUP_SIZE)
    ss = gl.allocate_shared_memory(s_desc.dtype, [SCALES_AHEAD, BLOCK_N // 64, 1, 64], s_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (
                consume_rows,
                (
                    0, xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, offsets_ptr,
                    row_index_ptr, out_index_ptr, rows, experts, N, row_tiles, BLOCKS, SCALES, DEQUANTIZE, HAS_BIAS,
                    GROUPS, BLOCK_M, BLOCK_N, STAGES, GROUP_N, UNROLL, OVERLAP, INT8, GROUP_SIZE,
                ),
            ),
            (
                consume_rows,
                (
                    1, xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, offsets_ptr,
                    row_index_ptr, out_index_ptr, rows, experts, N, row_tiles, BLOCKS, SCALES, DEQUANTIZE, HAS_BIAS,
                    GROUPS, BLOCK_M, BLOCK_N, STAGES, GROUP_N, UNROLL, OVERLAP, INT8, GROUP_SIZE,
                ),
            ),
            (
                produce_rows,
                (
                    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, offsets_ptr, rows, experts, N, row_tiles, BLOCKS, SCALES,
                    GROUP_SIZE, GROUPS, BLOCK_M, BLOCK_N, STAGES, GROUP_N, OVERLAP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def consume_stream(
    xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, offsets_ptr, row_index_ptr,
    out_index_ptr, rows, experts, N, row_tiles,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, ROW_WARPS: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """The computing warps of ``grouped_decode``: ``SPLIT`` along K times ``ROW_WARPS`` along N."""
    ROUNDS: gl.constexpr = (BLOCKS + STEPS * SPLIT - 1) // (STEPS * SPLIT)
    WARPS: gl.constexpr = SPLIT * ROW_WARPS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[SPLIT, ROW_WARPS, 1], instr_shape=[1, 16, 8]
    )
    ROWS: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [ROW_WARPS, SPLIT], [0, 1])
    if OVERLAP:
        wait_for_previous_kernel()
    starts, ends, through = group_tiles(offsets_ptr, rows, experts, GROUPS, BLOCK_M, WARPS)
    stage = 0
    for item in range(gl.program_id(0), gl.max(through, 0) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        group, first, start, end, tile_n = find_tile(starts, ends, through, item, N, GROUPS, BLOCK_M, BLOCK_N, 1, WARPS)
        acc = gl.zeros([SPLIT, BLOCK_N, BLOCK_M], gl.int32, LAYOUT)
        for _ in range(gl.where(group < experts, ROUNDS, 0)):
            slot = stage % STAGES
            mbarrier.wait(full.index(slot), (stage // STAGES) & 1)
            acc = multiply_round(
                acc, stage, slot * 2, xs, ws, ss, empty, SCALES, BLOCK_M, BLOCK_N, STAGES, STEPS, LAYOUT
            )
            stage += 1
        store_group_tile(
            gl.convert_layout(gl.sum(acc, axis=0), ROWS), out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr,
            row_index_ptr, out_index_ptr, first, first + BLOCK_M // 2, start, end, tile_n * BLOCK_N, N, group, experts, row_tiles,
            SCALES == "none", DEQUANTIZE, HAS_BIAS, ROWS, BLOCK_M, BLOCK_N, WARPS,
        )  # fmt: skip


@gluon.jit
def produce_stream(
    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, offsets_ptr, rows, experts, N, row_tiles,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, STEPS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The producer warp of ``grouped_decode``."""
    DEPTH: gl.constexpr = STEPS * SPLIT
    ROUNDS: gl.constexpr = (BLOCKS + DEPTH - 1) // DEPTH
    if OVERLAP:
        wait_for_previous_kernel()
    starts, ends, through = group_tiles(offsets_ptr, rows, experts, GROUPS, BLOCK_M, 1)
    stage = 0
    for item in range(gl.program_id(0), gl.max(through, 0) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        group, first, start, end, tile_n = find_tile(starts, ends, through, item, N, GROUPS, BLOCK_M, BLOCK_N, 1, 1)
        n0 = tile_n * BLOCK_N
        block = (group * row_tiles + n0 // 64) * BLOCKS
        for round in range(gl.where(group < experts, ROUNDS, 0)):
            slot = stage % STAGES
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), ((stage // STAGES) & 1) ^ 1)
            copy_weights(
                w_desc, s_desc, ws, ss, bar, slot, block + round * DEPTH, n0 % 64, True, SCALES, BLOCK_M, BLOCK_N, STEPS, False
            )  # fmt: skip
            load_activation_stage(x_desc, xs, bar, slot, round, first, True, STEPS)
            stage += 1


@gluon.jit(do_not_specialize=["rows"])
def grouped_decode(
    x_desc, w_desc, s_desc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, offsets_ptr, row_index_ptr,
    out_index_ptr, rows, experts, N, row_tiles,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, OVERLAP: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
):  # fmt: skip
    """``out`` ``[rows, N]``; persistent. Parameters as in ``grouped_cooperative``."""
    ws, ss = allocate_weights(w_desc, s_desc, STAGES, STEPS, BLOCK_N, GROUP_SIZE)
    xs = gl.allocate_shared_memory(gl.int8, [STAGES * 2, STEPS * SPLIT, BLOCK_M, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    ROW_WARPS: gl.constexpr = gl.num_warps() // SPLIT
    gl.warp_specialize(
        [
            (
                consume_stream,
                (
                    xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, offsets_ptr,
                    row_index_ptr, out_index_ptr, rows, experts, N, row_tiles, BLOCKS, SCALES, DEQUANTIZE, HAS_BIAS,
                    GROUPS, BLOCK_M, BLOCK_N, ROW_WARPS, STAGES, STEPS, OVERLAP,
                ),
            ),
            (
                produce_stream,
                (
                    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, offsets_ptr, rows, experts, N, row_tiles, BLOCKS, SCALES,
                    GROUPS, BLOCK_M, BLOCK_N, STAGES, STEPS, OVERLAP,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
