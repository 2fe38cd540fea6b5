"""Triton kernel of the grouped W4A8 linear layer (mixtures of experts) and its launchers.

Rows are sorted by expert and every expert has a weight of its own. Which expert a program works for follows from the
offsets, which the kernel reads itself: the host never waits for them, so a launch can be captured in a CUDA graph. The
grid covers the worst routing; programs that turn out to have no rows end at once.

The launchers also run CPU tensors under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import schedule_bits
from . import gluon_launch
from .gluon_grouped_launch import launch_gluon_grouped
from .grouped_tiles import choose_grouped_tile
from .launching import launch
from .tile import Tile
from .triton_epilogue import add_bias, dequantize_tile
from .triton_gemm import capability, gluon_obstacle, schedule_flags, use_ptx
from .triton_tile import accumulate_tile, tile_position


class GroupedForm(NamedTuple):
    """Static part of a stack of weights: as the last arguments of the op."""

    out_features: int
    group_size: int
    scale_bits: int
    packing: str


@triton.jit
def find_group(pid, offsets_ptr, rows, experts, tiles_n, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which group a program works for: ``(group, first row, end row, number of the program within the group)``.

    A group is an expert's rows, or, as group ``experts``, the rows after the last offset; a larger number means no rows.
    Programs of one group follow one another, so that they find its weights in L2. GROUPS is a power of 2 above ``experts``.
    """
    index = tl.arange(0, GROUPS)
    starts = tl.load(offsets_ptr + index - 1, mask=(index > 0) & (index <= experts), other=0)
    starts = tl.where(index > experts, rows, tl.maximum(tl.minimum(starts, rows), 0))
    ends = tl.minimum(tl.load(offsets_ptr + index, mask=index < experts, other=rows), rows)
    tiles = tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M)
    group = tl.sum((tl.cumsum(tiles, 0) <= pid // tiles_n).to(tl.int32), 0)
    first_tile = tl.sum(tl.where(index < group, tiles, 0), 0)
    start = tl.sum(tl.where(index == group, starts, 0), 0)
    end = tl.sum(tl.where(index == group, ends, 0), 0)
    return group, start, end, pid - first_tile * tiles_n


@triton.jit
def store_rows(out_ptr, values, out_index_ptr, positions, valid, n, N, SCATTER: tl.constexpr):
    """Store ``[BLOCK_N, BLOCK_M]`` into the rows of ``out`` ``[rows, N]`` that ``positions`` stand for."""
    if SCATTER:
        positions = tl.load(out_index_ptr + positions)
    mask = valid[None, :] & (n < N)[:, None]
    tl.store(out_ptr + positions.to(tl.int64)[None, :] * N + n[:, None], values, mask=mask)


@triton.jit
def w4a8_grouped_kernel(
    xq_ptr, token_scale_ptr, qdata_ptr, scale_ptr, zero_ptr, row_scale_ptr, bias_ptr, offsets_ptr, row_index_ptr, out_index_ptr,
    out_ptr, rows, experts, N, K, xq_stride, qdata_stride, scale_stride,
    DEQUANTIZE: tl.constexpr, HAS_BIAS: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, PACK: tl.constexpr, WEIGHT_BITS: tl.constexpr, FOLD: tl.constexpr, TIMES16: tl.constexpr,
    ASYMMETRIC: tl.constexpr, TILED: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """One tile of one expert: int32 accumulator, or its dequantized value if DEQUANTIZE; ``out`` is ``[rows, N]``.

    GATHER: row ``p`` of the sorted order is row ``row_index[p]`` of ``xq``. SCATTER: it goes to row ``out_index[p]`` of
    ``out``. Strides of ``qdata`` and ``scale`` are those from expert to expert;
    zero points lie as the scales do.
    """
    group, start, end, local = find_group(
        tl.program_id(0), offsets_ptr, rows, experts, tl.cdiv(N, BLOCK_N), GROUPS, BLOCK_M
    )
    if group > experts:
        return
    tile_m, tile_n = tile_position(local, end - start, N, BLOCK_M, BLOCK_N, GROUP_N)
    m = start + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    positions = tl.where(m < end, m, start)
    rows_n = tl.where(n < N, n, 0)
    if group == experts:
        zeros = tl.zeros([BLOCK_N, BLOCK_M], dtype=out_ptr.dtype.element_ty)
        store_rows(out_ptr, zeros, out_index_ptr, positions, m < end, n, N, SCATTER)
        return
    rows_m = positions
    if GATHER:
        rows_m = tl.load(row_index_ptr + positions)
    expert = group.to(tl.int64)
    zeros_of_expert = zero_ptr + expert * scale_stride if ASYMMETRIC else zero_ptr
    acc = accumulate_tile(
        xq_ptr, xq_stride, qdata_ptr + expert * qdata_stride, scale_ptr + expert * scale_stride, zeros_of_expert,
        rows_m, rows_n, K,
        GROUP_SIZE, PACK, WEIGHT_BITS, FOLD, TIMES16, ASYMMETRIC, TILED, EVEN_K, PTX, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if DEQUANTIZE:
        y = dequantize_tile(acc, token_scale_ptr, 1, row_scale_ptr + expert * N, rows_m, rows_n)
        if HAS_BIAS:
            y = add_bias(y, bias_ptr + expert * N, rows_n)
        y = y.to(out_ptr.dtype.element_ty)
        store_rows(out_ptr, y, out_index_ptr, positions, m < end, n, N, SCATTER)
    else:
        store_rows(out_ptr, acc, out_index_ptr, positions, m < end, n, N, SCATTER)


def row_tiles(rows: int, experts: int, block_m: int) -> int:
    """Most tiles of ``block_m`` rows that ``rows`` rows can need, however they fall to the experts and to none of them."""
    groups = min(experts + 1, rows)
    return groups + (rows - groups) // block_m


def pick_grouped_tile(
    rows: int, experts: int, n: int, k: int, group_size: int, scale_bits: int, weight_bits: int, packing: str,
    device: torch.device, asymmetric: bool = False, readable: bool = True,
) -> Tile:  # fmt: skip
    """Kernel and tile for a problem on a device; ``readable`` says whether the Gluon kernels can read the operands."""
    how = (k, group_size, scale_bits, weight_bits, packing, device, asymmetric)
    gluon = readable and gluon_obstacle(*how) is None
    schedule = (group_size, schedule_bits(scale_bits, asymmetric), weight_bits)
    return choose_grouped_tile(rows, experts, n, k, *schedule, capability(device), gluon)


def _index(index: Optional[Tensor]) -> Optional[Tensor]:
    return None if index is None else index.to(torch.int32).contiguous()


def _launch(
    out: Tensor,
    xq: Tensor,
    token_scale: Optional[Tensor],
    qdata: Tensor,
    scale: Tensor,
    row_scale: Optional[Tensor],
    bias: Optional[Tensor],
    offsets: Tensor,
    row_index: Optional[Tensor],
    out_index: Optional[Tensor],
    form: GroupedForm,
    tile: Optional[Tile],
    zero_point: Optional[Tensor],
) -> None:
    """Fill ``out`` ``[rows, N]``."""
    (rows, n), k, experts = out.shape, xq.shape[1], qdata.shape[0]
    if rows == 0 or n == 0:
        return
    xq = xq if xq.stride(1) == 1 else xq.contiguous()
    qdata, scale = qdata.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    weight_bits, asymmetric = 8 if qdata.dtype is torch.int8 else 4, zero_point is not None
    if tile is None:
        how = (form.group_size, form.scale_bits, weight_bits, form.packing, xq.device, asymmetric)
        readable = scale.dtype is not torch.int16 and gluon_launch.addressable(xq)
        tile = pick_grouped_tile(rows, experts, n, k, *how, readable)
    if tile.kernel != "triton":
        with torch.cuda.device(xq.device) if xq.is_cuda else contextlib.nullcontext():
            launch_gluon_grouped(
                out, xq, token_scale, qdata, scale, row_scale, bias, offsets.to(torch.int32).contiguous(), _index(row_index),
                _index(out_index), form.group_size, form.scale_bits, tile,
            )  # fmt: skip
        return
    grid = (row_tiles(rows, experts, tile.block_m) * triton.cdiv(n, tile.block_n),)
    with torch.cuda.device(xq.device) if xq.is_cuda else contextlib.nullcontext():
        launch(
            w4a8_grouped_kernel, grid,
            xq, token_scale, qdata, scale, zero_point, row_scale, bias, offsets.to(torch.int32).contiguous(), _index(row_index),
            _index(out_index), out, rows, experts, n, k, xq.stride(0), qdata.stride(0), scale.stride(0),
            DEQUANTIZE=token_scale is not None,
            HAS_BIAS=bias is not None,
            GATHER=row_index is not None,
            SCATTER=out_index is not None,
            GROUPS=triton.next_power_of_2(experts + 1),
            PTX=use_ptx(xq.device),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **schedule_flags(k, form.group_size, form.scale_bits, weight_bits, form.packing, tile, asymmetric),
        )  # fmt: skip


def grouped_accumulate_cuda(
    xq: Tensor,
    qdata: Tensor,
    scale: Tensor,
    offsets: Tensor,
    form: GroupedForm,
    row_index: Optional[Tensor] = None,
    out_index: Optional[Tensor] = None,
    tile: Optional[Tile] = None,
    zero_point: Optional[Tensor] = None,
) -> Tensor:
    """Integer accumulator ``[rows, N]`` int32; operands as in ``intscale::w4a8_grouped_linear``. For tests and sweeps.

    ``tile`` overrides :func:`~intscale_compile.kernels.grouped_tiles.choose_grouped_tile`; the result does not depend on it.
    """
    rows = xq.shape[0] if row_index is None else row_index.shape[0]
    out = xq.new_empty((rows, form.out_features), dtype=torch.int32)
    _launch(out, xq, None, qdata, scale, None, None, offsets, row_index, out_index, form, tile, zero_point)
    return out


def grouped_linear_cuda(
    xq: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    bias: Optional[Tensor],
    offsets: Tensor,
    form: GroupedForm,
    dtype: torch.dtype,
    row_index: Optional[Tensor] = None,
    out_index: Optional[Tensor] = None,
    tile: Optional[Tile] = None,
    zero_point: Optional[Tensor] = None,
) -> Tensor:
    """``acc * token_scale * row_scale (+ bias)``, computed in fp32 and rounded once to ``dtype``; ``[rows, N]``."""
    rows = xq.shape[0] if row_index is None else row_index.shape[0]
    out = xq.new_empty((rows, form.out_features), dtype=dtype)
    token_scale, row_scale = token_scale.reshape(-1).contiguous(), row_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    weight = (qdata, scale, row_scale, bias)
    _launch(out, xq, token_scale, *weight, offsets, row_index, out_index, form, tile, zero_point)
    return out
