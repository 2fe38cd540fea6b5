"""Gluon kernel of the W4A8 linear layer for up to 16 tokens: a stream of weights, limited by memory alone.

One producer warp keeps a deep ring of stages full through the tensor memory accelerator (TMA); a stage is ``4 * STEPS``
packing blocks of BLOCK_N rows. Four warps share the blocks of a stage among them, so that K is split *inside* a block of
threads: narrow layers fill the GPU without partial sums in global memory. Weights go from shared memory to the tensor
cores (``mma.sync``, the weight as left operand) in 16-byte loads, for which the features of a block are taken in another
order, the same for weight and activation: a dot product does not mind.

RESIDENT keeps the activations of all of K in shared memory, for programs that compute many tiles; otherwise they travel
through the ring beside the weights.

The four partial sums meet in shared memory after the last stage. Group scales are applied to the int32 sum of each group
(any uint8 scale), which at this size costs less than folding them into the weight; all of it is exact. A block has 128
features, which are two packing blocks if groups are of 32 or 64.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_common import (
    allow_next_kernel,
    copy_to_shared,
    packed_pieces,
    reinterpret_shared,
    scales_in_block,
    store_tile,
    unpack_times16,
    wait_for_previous_kernel,
)

SPLIT = gl.constexpr(4)  # warps that share K


@gluon.jit
def allocate_weights(
    w_desc, s_desc, STAGES: gl.constexpr, STEPS: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_SIZE: gl.constexpr
):
    """Shared memory for the codes and the group scales of all stages; a stage has a slot for each packing block and group."""
    PIECES: gl.constexpr = STAGES * packed_pieces(GROUP_SIZE)
    GROUPS: gl.constexpr = STAGES * scales_in_block(GROUP_SIZE)
    ws = gl.allocate_shared_memory(gl.int8, [PIECES, STEPS * SPLIT, BLOCK_N, w_desc.block_shape[2]], w_desc.layout)
    return ws, gl.allocate_shared_memory(s_desc.dtype, [GROUPS, STEPS * SPLIT, BLOCK_N], s_desc.layout)


@gluon.jit
def copy_weights(
    w_desc, s_desc, ws, ss, bar, slot, first, row, pred,
    SCALES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, RESIDENT: gl.constexpr,
):  # fmt: skip
    """Announce all bytes of a stage and start the copies of its codes and group scales, from block ``first`` and ``row`` on.

    Behind the last block of a row the copy runs on into other rows: there the activation is filled with zeros.
    """
    DEPTH: gl.constexpr = STEPS * SPLIT
    PIECES: gl.constexpr = 64 // ws.shape[3]
    GROUPS: gl.constexpr = ss.shape[0] * PIECES // ws.shape[0]
    SCALE_BYTES: gl.constexpr = 0 if SCALES == "none" else 4 * GROUPS if SCALES == "float" else GROUPS
    ACTIVATION_BYTES: gl.constexpr = 0 if RESIDENT else BLOCK_M * 128
    mbarrier.expect(bar, DEPTH * (BLOCK_N * (64 + SCALE_BYTES) + ACTIVATION_BYTES), pred=pred)
    for piece in gl.static_range(PIECES):
        copy_to_shared(w_desc, [first, piece * 64 + row, 0], bar, ws.index(slot * PIECES + piece), pred=pred)
    if SCALES != "none":
        for g in gl.static_range(GROUPS):
            copy_to_shared(s_desc, [first, g * 64 + row], bar, ss.index(slot * GROUPS + g), pred=pred)


@gluon.jit
def load_weight_stage(
    w_desc, s_desc, ws, ss, full, item, items,
    BLOCKS: gl.constexpr, ROUNDS: gl.constexpr, SCALES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, STEPS: gl.constexpr, RESIDENT: gl.constexpr,
):  # fmt: skip
    """:func:`copy_weights` of one item, a stage of a tile of this program, unless ``item >= items``."""
    n0 = (gl.program_id(0) + item // ROUNDS * gl.num_programs(0)) * BLOCK_N
    first = (n0 // 64) * BLOCKS + item % ROUNDS * (STEPS * SPLIT)
    slot = item % STAGES
    copy_weights(
        w_desc, s_desc, ws, ss, full.index(slot), slot, first, n0 % 64, item < items, SCALES, BLOCK_M, BLOCK_N, STEPS, RESIDENT
    )  # fmt: skip


@gluon.jit
def load_activation_stage(x_desc, xs, bar, slot, round, m0, pred, STEPS: gl.constexpr):
    """Start the copies of both halves of one round's activations."""
    for half in gl.static_range(2):
        where = [round * (STEPS * SPLIT), m0, half * 64]
        copy_to_shared(x_desc, where, bar, xs.index(slot * 2 + half), pred=pred)


@gluon.jit
def produce(
    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    STEPS: gl.constexpr, OVERLAP: gl.constexpr, RESIDENT: gl.constexpr,
):  # fmt: skip
    """The producer warp: weights of the first stages before all else, then the ring for every tile of this program."""
    ROUNDS: gl.constexpr = (BLOCKS + STEPS * SPLIT - 1) // (STEPS * SPLIT)
    m0 = gl.program_id(1) * BLOCK_M
    items = gl.cdiv(gl.cdiv(N, BLOCK_N) - gl.program_id(0), gl.num_programs(0)) * ROUNDS
    for i in gl.static_range(STAGES):
        load_weight_stage(
            w_desc, s_desc, ws, ss, full, i, items, BLOCKS, ROUNDS, SCALES, BLOCK_M, BLOCK_N, STAGES, STEPS, RESIDENT
        )
    if OVERLAP:
        wait_for_previous_kernel()
    if RESIDENT:
        mbarrier.expect(full.index(STAGES), ROUNDS * STEPS * SPLIT * BLOCK_M * 128)
        for i in gl.static_range(ROUNDS):
            load_activation_stage(x_desc, xs, full.index(STAGES), i, i, m0, True, STEPS)
    else:
        for i in gl.static_range(STAGES):
            load_activation_stage(x_desc, xs, full.index(i), i, i % ROUNDS, m0, i < items, STEPS)
    for item in range(STAGES, items):
        slot = item % STAGES
        mbarrier.wait(empty.index(slot), ((item // STAGES) & 1) ^ 1)
        load_weight_stage(
            w_desc, s_desc, ws, ss, full, item, items, BLOCKS, ROUNDS, SCALES, BLOCK_M, BLOCK_N, STAGES, STEPS, RESIDENT
        )
        if not RESIDENT:
            load_activation_stage(x_desc, xs, full.index(slot), slot, item % ROUNDS, m0, True, STEPS)


@gluon.jit
def after_loads(acc):
    """The same sums, known before whatever follows: with them all loads of a stage have arrived.

    A barrier among warps waits for no load whose value nothing has used, and such a load may be late by microseconds, when the
    stage has been filled again (seen in ``gluon_cooperative``). A trap that is never taken, as no sum is -2**31 (the proof
    bounds magnitudes), keeps the barrier and what gives the stage back behind the last product. It takes 2 to 9 % of the time
    (H100); giving a stage back one later takes 0 to 5 %, but 14 % where there are two stages.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.eq.b32 p, $1, 0x80000000;
        @p trap;
        mov.b32 $0, $1;
        }""",
        "=r,r",
        [acc],
        dtype=acc.dtype,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def add_scaled(acc, part, scales, step: gl.constexpr, LAYOUT: gl.constexpr):
    """Add sums of one group of each block, 16 times too large, by their scales: of ``step`` in a stage's."""
    scales = scales.slice(step * SPLIT, SPLIT, 0).load(gl.SliceLayout(2, LAYOUT))
    if scales.dtype == gl.float32:
        acc = acc + (part >> 4).to(gl.float32) * gl.expand_dims(scales, 2)
    else:
        acc = acc + (part >> 4) * gl.expand_dims(scales.to(gl.int32), 2)
    return acc


@gluon.jit
def multiply_round(
    acc, item, x_slot, xs, ws, ss, empty, SCALES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, STEPS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add stage ``item`` of the ring to the ``[SPLIT, BLOCK_N, BLOCK_M]`` sums and give a stage free."""
    HALF: gl.constexpr = ws.shape[3]  # features of the low nibbles of a packing block, and of the high ones
    PIECES: gl.constexpr = 64 // HALF
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=HALF // 4)
    B: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=LAYOUT, k_width=HALF // 4)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    GROUPS: gl.constexpr = ss.shape[0] // STAGES
    zero = gl.zeros([SPLIT, BLOCK_N, BLOCK_M], gl.int32, LAYOUT)
    slot = item % STAGES
    for step in gl.static_range(STEPS):
        for piece in gl.static_range(PIECES):
            packed = ws.index(slot * PIECES + piece).slice(step * SPLIT, SPLIT, 0).load(A)
            if PIECES == 1:
                x_low = xs.index(x_slot).permute((0, 2, 1)).slice(step * SPLIT, SPLIT, 0).load(B)
                x_high = xs.index(x_slot + 1).permute((0, 2, 1)).slice(step * SPLIT, SPLIT, 0).load(B)
            else:  # a packing block is half of the 128 features; swizzled rows could not be halved
                x = reinterpret_shared(xs.index(x_slot + piece), gl.int8, [STEPS * SPLIT, BLOCK_M, 64], ROWS)
                x = x.slice(step * SPLIT, SPLIT, 0)
                x_low = x.slice(0, HALF, 2).permute((0, 2, 1)).load(B)
                x_high = x.slice(HALF, HALF, 2).permute((0, 2, 1)).load(B)
            low, high = unpack_times16(packed)
            part = mma_v2(low, x_low, zero)
            if GROUPS == 4:
                acc = add_scaled(acc, part, ss.index(slot * 4 + piece * 2), step, LAYOUT)
                part = zero
            part = mma_v2(high, x_high, part)
            if SCALES == "none":
                acc = acc + (part >> 4)
            else:
                group = slot * GROUPS + (piece + 1) * (GROUPS // PIECES) - 1
                acc = add_scaled(acc, part, ss.index(group), step, LAYOUT)
    if STAGES > 2:  # the stage before: the loads of this one, of which some have been used, came after all of its loads
        mbarrier.arrive(empty.index((item + STAGES - 1) % STAGES), count=1, pred=item > 0)
    else:
        acc = after_loads(acc)
        mbarrier.arrive(empty.index(slot), count=1)
    return acc


@gluon.jit
def consume(
    xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, ROW_WARPS: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, OVERLAP: gl.constexpr,
    RESIDENT: gl.constexpr,
):  # fmt: skip
    """The computing warps: ``SPLIT`` along K times ``ROW_WARPS`` along N."""
    ROUNDS: gl.constexpr = (BLOCKS + STEPS * SPLIT - 1) // (STEPS * SPLIT)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[SPLIT, ROW_WARPS, 1], instr_shape=[1, 16, 8]
    )
    m0 = gl.program_id(1) * BLOCK_M
    tiles = gl.cdiv(gl.cdiv(N, BLOCK_N) - gl.program_id(0), gl.num_programs(0))
    if OVERLAP:
        wait_for_previous_kernel()
    if RESIDENT:
        mbarrier.wait(full.index(STAGES), 0)
    item = 0
    for tile in range(tiles):
        n0 = (gl.program_id(0) + tile * gl.num_programs(0)) * BLOCK_N
        acc = gl.zeros([SPLIT, BLOCK_N, BLOCK_M], gl.float32 if SCALES == "float" else gl.int32, LAYOUT)
        for round in range(ROUNDS):
            slot = item % STAGES
            if RESIDENT:
                x_slot = round * 2
            else:
                x_slot = slot * 2
            mbarrier.wait(full.index(slot), (item // STAGES) & 1)
            acc = multiply_round(acc, item, x_slot, xs, ws, ss, empty, SCALES, BLOCK_M, BLOCK_N, STAGES, STEPS, LAYOUT)
            item += 1
        ROWS: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [ROW_WARPS, SPLIT], [0, 1])
        store_tile(
            gl.convert_layout(gl.sum(acc, axis=0), ROWS), out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr,
            None, m0, m0 + BLOCK_M // 2, n0, M, N, SCALES == "none", DEQUANTIZE, HAS_BIAS, ROWS, BLOCK_M, BLOCK_N,
            SPLIT * ROW_WARPS, "none", False,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M"])
def gemm_decode(
    x_desc, w_desc, s_desc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, M, N,
    BLOCKS: gl.constexpr, SCALES: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, OVERLAP: gl.constexpr,
    RESIDENT: gl.constexpr, GROUP_SIZE: gl.constexpr,
):  # fmt: skip
    """``out[m, n]``, ``[M, N]``; persistent along N, one row of programs per BLOCK_M tokens; see the module."""
    ws, ss = allocate_weights(w_desc, s_desc, STAGES, STEPS, BLOCK_N, GROUP_SIZE)
    ROUNDS: gl.constexpr = (BLOCKS + STEPS * SPLIT - 1) // (STEPS * SPLIT)
    X_SLOTS: gl.constexpr = ROUNDS if RESIDENT else STAGES
    xs = gl.allocate_shared_memory(gl.int8, [X_SLOTS * 2, STEPS * SPLIT, BLOCK_M, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())  # the last: resident ones
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(STAGES), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    if OVERLAP:
        allow_next_kernel()
    ROW_WARPS: gl.constexpr = gl.num_warps() // SPLIT
    gl.warp_specialize(
        [
            (
                consume,
                (
                    xs, ws, ss, full, empty, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, M, N,
                    BLOCKS, SCALES, DEQUANTIZE, HAS_BIAS, BLOCK_M, BLOCK_N, ROW_WARPS, STAGES, STEPS, OVERLAP,
                    RESIDENT,
                ),
            ),
            (
                produce,
                (
                    x_desc, w_desc, s_desc, xs, ws, ss, full, empty, N,
                    BLOCKS, SCALES, BLOCK_M, BLOCK_N, STAGES, STEPS, OVERLAP, RESIDENT,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
