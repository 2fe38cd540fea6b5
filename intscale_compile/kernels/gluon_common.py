"""Gluon device functions that the Hopper kernels share: unpacking, programmatic launch, tile order, epilogue.

Gluon (``triton.experimental.gluon``) is Triton with explicit layouts and asynchronous copies. Its interface moves between
releases: :mod:`gluon_launch` says which ones these kernels are written for. Their plain-Triton twins are in
``triton_tile.py``; both give the same int32 accumulator.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

# Waits for all warps of a program or partition; renamed in Triton 3.7.
block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
# Starts a copy of a tensor descriptor's block to shared memory; renamed in Triton 3.8, the old name fails from 3.9 on.
copy_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# Starts a copy from shared memory to a block of a tensor descriptor; renamed in Triton 3.8 too.
copy_to_global = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


if hasattr(gl.shared_memory_descriptor, "reinterpret"):  # from Triton 3.9 on

    @gluon.jit
    def reinterpret_shared(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """The same bytes of shared memory under another shape or layout; from Triton 3.8 on of equal size."""
        return memory.reinterpret(DTYPE, SHAPE, LAYOUT)

else:

    @gluon.jit
    def reinterpret_shared(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """The same bytes of shared memory under another shape or layout; from Triton 3.8 on of equal size."""
        return memory._reinterpret(DTYPE, SHAPE, LAYOUT)


@gluon.jit
def allow_next_kernel():
    """Let a kernel launched behind this one with programmatic dependent launch begin before this one ends."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;",
        "=r,~{memory}",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_for_previous_kernel():
    """Wait until all that was launched before is complete and visible; only weights may be read before."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def unpack_times16(packed):
    """Codes of both nibbles of uint8 ``packed``, int8, 16 times too large: ``(u ^ 8) << 4`` is ``16 * (u - 8)``."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        shl.b32 t, $2, 4;
        lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A;
        lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
        }""",
        "=&r,=r,r",
        [packed],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def fold_codes_of_two(packed, low_scales, high_scales):
    """``code * scale`` of both nibbles of uint8 ``packed`` ``[N, P/2]``, int8; scales of each int32 ``[N]`` in 1 to 15."""
    # As triton_tile.fold_codes: u * s + (128 - 8 s) stays within a byte, and flipping bit 7 takes the 128 off.
    low_offset = -2139062144 - low_scales * 0x08080808
    high_offset = -2139062144 - high_scales * 0x08080808
    low_scale, _ = gl.broadcast(gl.expand_dims(low_scales, 1), packed)
    low_offset, _ = gl.broadcast(gl.expand_dims(low_offset, 1), packed)
    high_scale, _ = gl.broadcast(gl.expand_dims(high_scales, 1), packed)
    high_offset, _ = gl.broadcast(gl.expand_dims(high_offset, 1), packed)
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t, u;
        and.b32 t, $2, 0x0F0F0F0F;
        shr.b32 u, $2, 4;
        and.b32 u, u, 0x0F0F0F0F;
        mad.lo.u32 t, t, $3, $7;
        mad.lo.u32 u, u, $11, $15;
        xor.b32 $0, t, 0x80808080;
        xor.b32 $1, u, 0x80808080;
        }""",
        "=&r,=&r" + ",r" * 17,
        [packed, low_scale, low_offset, high_scale, high_offset],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def fold_codes(packed, scales):
    """:func:`fold_codes_of_two` where both nibbles are of one group."""
    return fold_codes_of_two(packed, scales, scales)


@gluon.constexpr_function
def scales_in_block(group_size):
    """Group scales of a row in one block of 128 features."""
    return max(1, 128 // group_size)


@gluon.constexpr_function
def blocks_of_group(group_size):
    """Blocks of 128 features that share a group scale."""
    return max(1, group_size // 128)


@gluon.constexpr_function
def packed_pieces(group_size):
    """Packing blocks in one block of 128 features."""
    return 2 if group_size in (32, 64) else 1


@gluon.jit
def add_four(acc, a, b, c, d, x):
    """Start four products of 32 features each, with activations ``x`` ``[tokens, 128]`` in shared memory."""
    acc = warpgroup_mma(a, x.slice(0, 32, 1).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(b, x.slice(32, 32, 1).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(c, x.slice(64, 32, 1).permute((1, 0)), acc, is_async=True)
    return warpgroup_mma(d, x.slice(96, 32, 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def add_group(acc, codes, more, x, first: gl.constexpr, scales, SHIFT: gl.constexpr, LAYOUT: gl.constexpr):
    """Add the scaled sum of one group, of ``codes`` and unless None ``more``, whose features begin at ``first``."""
    part = gl.zeros(acc.shape, gl.int32, LAYOUT)
    part = warpgroup_mma(codes, x.slice(first, 32, 1).permute((1, 0)), part, use_acc=False, is_async=True)
    if more is not None:
        part = warpgroup_mma(more, x.slice(first + 32, 32, 1).permute((1, 0)), part, is_async=True)
    part = warpgroup_mma_wait(0, deps=(part,)) >> SHIFT
    if scales.dtype == gl.float32:
        part = part.to(gl.float32)
    return acc + part * gl.expand_dims(scales, 1)


@gluon.jit
def add_block_groups(
    acc, low, high, x, first: gl.constexpr, low_scales, high_scales, GROUP_SIZE: gl.constexpr, SHIFT: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add the scaled sums of the one or two groups in a packing block of 64 features; the products are complete on return.

    Codes are ``2**SHIFT`` times too large. Of groups of 64 ``high_scales`` is not looked at.
    """
    if GROUP_SIZE == 64:
        acc = add_group(acc, low, high, x, first, low_scales, SHIFT, LAYOUT)
    else:
        acc = add_group(acc, low, None, x, first, low_scales, SHIFT, LAYOUT)
        acc = add_group(acc, high, None, x, first + 32, high_scales, SHIFT, LAYOUT)
    return acc


@gluon.jit
def tile_position(pid, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_N: gl.constexpr):
    """``(tile_m, tile_n)`` of a tile number: GROUP_N columns of tiles share their weights in L2 over all of M."""
    tiles_m = gl.cdiv(M, BLOCK_M)
    width = GROUP_N * tiles_m
    first = (pid // width) * GROUP_N
    span = gl.minimum(gl.cdiv(N, BLOCK_N) - first, GROUP_N)
    return (pid % width) // span, first + (pid % width) % span


@gluon.jit
def token_halves(tile_m, M, BLOCK_M: gl.constexpr):
    """First tokens of the two halves of a tile. Halves that would reach past M begin earlier and repeat tokens of others.

    The tensor memory accelerator is slow where it fills rows that do not exist with zeros: 129 tokens in tiles of 128 took
    longer than 256 (H100). Repeated tokens are stored twice with the same bits. Below BLOCK_M / 2 tokens rows are filled.
    """
    HALF: gl.constexpr = BLOCK_M // 2
    last = gl.maximum(M - HALF, 0)
    first = tile_m * BLOCK_M
    return gl.minimum(first, last), gl.minimum(first + HALF, last)


@gluon.jit
def tile_tokens(first, second, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """Token of each of the BLOCK_M rows of a tile whose halves begin at ``first`` and ``second``."""
    row = gl.arange(0, BLOCK_M, layout=LAYOUT)
    return row + gl.where(row < BLOCK_M // 2, first, second - BLOCK_M // 2)


@gluon.jit
def load_tokens(x_desc, xs, bar, slot, first, second, block, pred, BLOCK_M: gl.constexpr):
    """Start the copies of a stage's activations: both halves of a tile, for one packing block of 128 features."""
    HALF: gl.constexpr = BLOCK_M // 2
    x = xs.index(slot)
    copy_to_shared(x_desc, [first, block * 128], bar, x.slice(0, HALF, 0), pred=pred)
    copy_to_shared(x_desc, [second, block * 128], bar, x.slice(HALF, HALF, 0), pred=pred)


@gluon.jit
def gate_activation(gate, GATED: gl.constexpr):
    """SiLU or GELU in fp32, term for term as in ``triton_gated.gate_activation``."""
    if GATED == "silu":
        y = gate / (1.0 + gl.exp(-gate))
    elif GATED == "gelu":
        y = 0.5 * gate * (1.0 + gl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2 u)); 2 * sqrt(2 / pi) = 1.5957691216057308.
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        y = gate / (1.0 + gl.exp(-u))
    return y


@gluon.jit
def store_tile(
    acc, out_ptr, scale_ptr, row_scale_ptr, token_scale_ptr, bias_ptr, residual_ptr, first, second, n0, M, N,
    CHANNEL_SCALE: gl.constexpr, DEQUANTIZE: gl.constexpr, HAS_BIAS: gl.constexpr, LAYOUT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, GATED: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Epilogue of one tile: ``acc`` ``[BLOCK_N, BLOCK_M]`` (int32, or fp32 with float scales) to ``out`` ``[M, N]``.

    ``first`` and ``second`` are the tokens at which the halves of the tile begin (:func:`token_halves`).

    With GATED the first half of ``acc`` are gate rows, the second the up rows that belong to them, and ``out`` is
    ``[M, N/2]``; ``n0`` and N count weight rows all the same. A residual is contiguous like ``out`` and is added to the
    rounded value, as an addition after the linear would.
    """
    HALVES: gl.constexpr = 1 if GATED == "none" else 2
    WIDTH: gl.constexpr = BLOCK_N // HALVES
    columns = N // HALVES
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    if GATED != "none":
        row = n - n0
        n = n0 // 2 + row % WIDTH + row // WIDTH * columns
    m = tile_tokens(first, second, BLOCK_M, gl.SliceLayout(0, LAYOUT))
    if CHANNEL_SCALE:
        acc = acc * gl.load(scale_ptr + n, mask=n < N, other=0).to(gl.int32)[:, None]
    if DEQUANTIZE:
        row_scale = gl.load(row_scale_ptr + n, mask=n < N, other=0.0)
        token_scale = gl.load(token_scale_ptr + m, mask=m < M, other=0.0)
        y = acc.to(gl.float32) * token_scale[None, :] * row_scale[:, None]
        if HAS_BIAS:
            y = y + gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    else:
        y = acc
    if GATED != "none":
        # Rows BLOCK_N / 2 apart are registers of one thread, so nothing moves here.
        gate, up = gl.split(gl.permute(gl.reshape(y, [2, WIDTH, BLOCK_M]), (1, 2, 0)))
        y = gate_activation(gate, GATED) * up
    y = y.to(out_ptr.dtype.element_ty)
    # Rows of the output run along n: eight of them a thread, so that a warp writes whole 128-byte lines.
    RUN: gl.constexpr = 8 if WIDTH >= 64 else WIDTH // 8
    ACROSS: gl.constexpr = WIDTH // RUN if WIDTH // RUN < 32 else 32
    ROWS: gl.constexpr = gl.BlockedLayout([RUN, 1], [ACROSS, 32 // ACROSS], [1, WARPS], [0, 1])
    y = gl.convert_layout(y, ROWS)
    n = n0 // HALVES + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, ROWS))
    m = tile_tokens(first, second, BLOCK_M, gl.SliceLayout(0, ROWS))
    ptrs = out_ptr + m[None, :].to(gl.int64) * columns + n[:, None]
    mask = (m < M)[None, :] & (n < columns)[:, None]
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + m[None, :].to(gl.int64) * columns + n[:, None], mask=mask, other=0.0)
        y = (y.to(gl.float32) + residual.to(gl.float32)).to(out_ptr.dtype.element_ty)
    gl.store(ptrs, y, mask=mask)
