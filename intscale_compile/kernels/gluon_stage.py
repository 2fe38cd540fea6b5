"""What a consumer of the cooperative kernels does with one stage of the ring: expand codes in registers, multiply, scale sums.

The products of a stage are started (:func:`start_products`) and awaited (:func:`finish_products`) in two steps, so that the
codes and group scales of the next stage can be read from shared memory between the two (:func:`multiply_ahead`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .gluon_common import (
    add_block_groups,
    add_four,
    fold_codes,
    fold_codes_of_two,
    reinterpret_shared,
    scales_in_block,
    unpack_times16,
)


@gluon.constexpr_function
def copied_scales(block_n):
    """Rows whose group scales are copied for each stage: a power of 2, as a descriptor's box is."""
    return 256 if block_n == 192 else block_n


@gluon.jit
def consumer_scales(
    ss, slot, CONSUMER: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """Scales of one group and one consumer's rows, ``[ROWS]``, as int32 (or fp32)."""
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    every = reinterpret_shared(ss.index(slot), ss.dtype, [copied_scales(BLOCK_N)], LINEAR)
    if GATED == "none":
        scales = every.slice(CONSUMER * ROWS, ROWS, 0).load(LAYOUT)
    else:  # 8 rows of gate and of up in turns, see load_weights: as the warps hold them, so that nothing moves
        HALF: gl.constexpr = gl.DistributedLinearLayout([], [[0], [0], [1], [2], [4]], [[8], [16]], [], [32])
        gate = every.slice(CONSUMER * 32, 32, 0).load(HALF)
        up = every.slice(64 + CONSUMER * 32, 32, 0).load(HALF)
        scales = gl.reshape(gl.permute(gl.reshape(gl.join(gate, up), [4, 8, 2]), (0, 2, 1)), [64])
        scales = gl.convert_layout(scales, LAYOUT)
    return scales if ss.dtype == gl.float32 else scales.to(gl.int32)


@gluon.jit
def one_where_loaded(scales):
    """1 for each group scale (0 for rows that do not exist), known only when the scale has arrived in its register.

    A load from shared memory that nothing has used yet may still wait in the queue of its part of the multiprocessor when the
    warps meet and the stage is given free, behind the other consumer's stores, for longer than the producer needs to refill the
    stage: with 8-bit scales and several tiles a program, sums were wrong on an H100. So the product itself depends on the scales.
    """
    IS_FLOAT: gl.constexpr = scales.dtype == gl.float32
    if IS_FLOAT:
        one = (scales != 0.0).to(gl.int32)
    else:
        one = gl.minimum(scales, 1)
    return one


@gluon.jit
def expand_fine_stage(
    slot, ws, ss, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
    SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """:func:`expand_stage` for groups of 32 and 64; with two sums what is to be expanded: two packing blocks, four scales."""
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=4)
    BLOCK_N: gl.constexpr = ROWS * CONSUMERS
    GROUPS: gl.constexpr = scales_in_block(GROUP_SIZE)
    piece = (slot * CONSUMERS + CONSUMER) * 2
    first, second = ws.index(piece).load(A), ws.index(piece + 1).load(A)
    group = slot * GROUPS
    s0 = consumer_scales(ss, group, CONSUMER, ROWS, gl.SliceLayout(1, A), BLOCK_N, GATED)
    s1 = consumer_scales(ss, group + GROUPS // 2 - 1, CONSUMER, ROWS, gl.SliceLayout(1, A), BLOCK_N, GATED)
    s2 = consumer_scales(ss, group + GROUPS // 2, CONSUMER, ROWS, gl.SliceLayout(1, A), BLOCK_N, GATED)
    s3 = consumer_scales(ss, group + GROUPS - 1, CONSUMER, ROWS, gl.SliceLayout(1, A), BLOCK_N, GATED)
    if SCALES == "fold":
        low, high = fold_codes_of_two(first, s0, s1)
        next_low, next_high = fold_codes_of_two(second, s2, s3)
        return low, high, next_low, next_high
    else:
        return first, second, s0, s1, s2, s3


@gluon.jit
def add_fine_stage(acc, stage, x, GROUP_SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """``acc`` with the products of a stage of groups of 32 or 64 whose sums are scaled; one packing block behind the other."""
    SUMS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    first, second, s0, s1, s2, s3 = stage
    low, high = fold_codes_of_two(first, one_where_loaded(s0), one_where_loaded(s1))
    s0, s1 = gl.convert_layout(s0, SUMS), gl.convert_layout(s1, SUMS)
    acc = add_block_groups(acc, low, high, x, 0, s0, s1, GROUP_SIZE, 0, LAYOUT)
    low, high = fold_codes_of_two(second, one_where_loaded(s2), one_where_loaded(s3))
    s2, s3 = gl.convert_layout(s2, SUMS), gl.convert_layout(s3, SUMS)
    return add_block_groups(acc, low, high, x, 64, s2, s3, GROUP_SIZE, 0, LAYOUT)


@gluon.jit
def expand_stage(
    slot, ws, ss, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
    SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """4-bit codes of a stage in a consumer's registers, int8 and folded with their scales where SCALES says so.

    Returns the left operands of the stage's products in the order of the features; with two sums the group scales follow.
    """
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=4)
    if GROUP_SIZE < 128:
        stage = expand_fine_stage(slot, ws, ss, CONSUMER, CONSUMERS, SCALES, GROUP_SIZE, ROWS, LAYOUT, GATED)
    else:
        packed = ws.index(slot * CONSUMERS + CONSUMER).load(A)
        if SCALES == "none":
            low, high = unpack_times16(packed)
            stage = low, high
        else:
            scales = consumer_scales(ss, slot, CONSUMER, ROWS, gl.SliceLayout(1, A), ROWS * CONSUMERS, GATED)
            if SCALES == "fold":
                low, high = fold_codes(packed, scales)
                stage = low, high
            else:  # codes at their own size: the sums of a group need no shift
                low, high = fold_codes(packed, one_where_loaded(scales))
                stage = low, high, scales
    return stage


@gluon.jit
def start_products(acc, stage, x, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Start the products of an expanded stage with its activations ``x``; returns the sum that they will be in.

    That is ``acc`` with one sum, and a sum of the group with two. Groups of 32 and 64 with two sums are not started here.
    """
    ONE_SUM: gl.constexpr = SCALES == "fold" or SCALES == "none"
    if GROUP_SIZE < 128:
        if ONE_SUM:
            acc = add_four(acc, stage[0], stage[1], stage[2], stage[3], x)
    else:
        x_low = x.slice(0, 64, 1).permute((1, 0))
        x_high = x.slice(64, 64, 1).permute((1, 0))
        if ONE_SUM:
            acc = warpgroup_mma(stage[0], x_low, acc, is_async=True)
        else:
            part = gl.zeros(acc.shape, gl.int32, LAYOUT)
            acc = warpgroup_mma(stage[0], x_low, part, use_acc=False, is_async=True)
        acc = warpgroup_mma(stage[1], x_high, acc, is_async=True)
    return acc


@gluon.jit
def finish_products(
    acc, started, stage, x, empty, SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, LAYOUT: gl.constexpr
):
    """``acc`` with the products of a stage that were ``started``; the stage is given back by an arrival at ``empty``."""
    if SCALES == "fold" or SCALES == "none":
        acc = warpgroup_mma_wait(0, deps=(started,))
        mbarrier.arrive(empty, count=1)
    elif GROUP_SIZE < 128:
        acc = add_fine_stage(acc, stage, x, GROUP_SIZE, LAYOUT)
        mbarrier.arrive(empty, count=1)
    else:
        part = warpgroup_mma_wait(0, deps=(started,))
        mbarrier.arrive(empty, count=1)
        if SCALES == "float":
            part = part.to(gl.float32)
        acc = acc + part * gl.expand_dims(gl.convert_layout(stage[2], gl.SliceLayout(1, LAYOUT)), 1)
    return acc


@gluon.jit
def multiply_half(
    acc, slot, xs, ws, ss, empty, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
    SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
    INT8: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Add one stage to the ``[ROWS, BLOCK_M]`` sums of a consumer, and free its part of the stage."""
    x = xs.index(slot)
    if INT8:
        acc = warpgroup_mma(ws.index(slot * CONSUMERS + CONSUMER), x.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(slot), count=1)
    else:
        stage = expand_stage(slot, ws, ss, CONSUMER, CONSUMERS, SCALES, GROUP_SIZE, ROWS, LAYOUT, GATED)
        started = start_products(acc, stage, x, SCALES, GROUP_SIZE, LAYOUT)
        acc = finish_products(acc, started, stage, x, empty.index(slot), SCALES, GROUP_SIZE, LAYOUT)
    return acc


@gluon.jit
def multiply_ahead(
    acc, first, xs, ws, ss, full, empty, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
    SCALES: gl.constexpr, GROUP_SIZE: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr, GATED: gl.constexpr,
    STAGES: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """Add UNROLL stages, of which ``first`` is the first; each is read while the tensor cores work on the one before.

    Nothing that was read goes around the loop: int8 values would be taken apart and put together again on the way.
    """
    mbarrier.wait(full.index(first % STAGES), (first // STAGES) & 1)
    stage = expand_stage(first % STAGES, ws, ss, CONSUMER, CONSUMERS, SCALES, GROUP_SIZE, ROWS, LAYOUT, GATED)
    for u in gl.static_range(UNROLL):
        slot = (first + u) % STAGES
        x = xs.index(slot)
        started = start_products(acc, stage, x, SCALES, GROUP_SIZE, LAYOUT)
        behind = stage
        if u + 1 < UNROLL:
            following = first + u + 1
            mbarrier.wait(full.index(following % STAGES), (following // STAGES) & 1)
            behind = expand_stage(
                following % STAGES, ws, ss, CONSUMER, CONSUMERS, SCALES, GROUP_SIZE, ROWS, LAYOUT, GATED
            )
        acc = finish_products(acc, started, stage, x, empty.index(slot), SCALES, GROUP_SIZE, LAYOUT)
        stage = behind
    return acc
