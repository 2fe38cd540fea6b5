"""Launchers of the Gluon kernels of the grouped linear layer, whose tiles have ``kernel`` ``cooperative`` or ``decode``."""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gluon_launch import (
    REGISTERS,
    decode_descriptors,
    gemm_descriptors,
    loop_body,
    scale_schedule,
    sm_count,
)
from .gluon_tiles import for_output, scales_in_block
from .launching import launch
from .tile import Tile

GATHER_BYTES = 2048  # of a row, by one program
FEWEST_GROUPS = 32  # a group for each thread of a warp


@triton.jit
def gather_rows_kernel(x_ptr, index_ptr, out_ptr, K, x_stride, BLOCK: tl.constexpr):
    """``out[p] = x[index[p]]`` of int8 rows of K elements; ``out`` is contiguous."""
    position = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + position).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + position * K + k, tl.load(x_ptr + row * x_stride + k, mask=k < K), mask=k < K)


def _sorted_rows(xq: Tensor, row_index: Tensor) -> Tensor:
    """``xq[row_index]``, int8 ``[rows, K]``: the tensor memory accelerator reads rows that lie side by side."""
    rows, k = row_index.shape[0], xq.shape[1]
    out = xq.new_empty((rows, k))
    grid = (rows, triton.cdiv(k, GATHER_BYTES))
    launch(gather_rows_kernel, grid, xq, row_index, out, k, xq.stride(0), BLOCK=GATHER_BYTES)
    return out


def launch_gluon_grouped(
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
    group_size: int,
    scale_bits: int,
    tile: Tile,
) -> None:
    """Fill ``out`` ``[rows, N]`` as the plain-Triton launcher does.

    Args:
        xq: int8 ``[tokens, K]``, rows contiguous and a multiple of 16 bytes apart, 16-byte aligned.
        qdata, scale: stacks in tiled packing, contiguous.
        offsets, row_index, out_index: int32.
        tile: of :func:`~.grouped_tiles.choose_grouped_tile`.
    """
    # Imports Triton's Gluon, which not every release has.
    from .gluon_grouped import grouped_cooperative, grouped_decode

    (rows, n), (experts, padded), k = out.shape, qdata.shape[:2], xq.shape[1]
    weight_bits, decode, blocks = 8 if qdata.dtype is torch.int8 else 4, tile.kernel == "decode", k // 128
    schedule = scale_schedule(group_size, scale_bits, weight_bits, decode)
    groups = scales_in_block(group_size)
    tile = for_output(tile, "int8" if weight_bits == 8 else schedule, out.element_size(), groups)
    if row_index is not None:
        xq = _sorted_rows(xq, row_index)
    operands = (out, scale, row_scale, token_scale, bias, offsets, row_index, out_index, rows, experts, n, padded // 64)
    group_size = group_size if group_size > 0 else 128
    flags: dict[str, Any] = dict(
        BLOCKS=blocks, GROUP_SIZE=group_size, SCALES=schedule, DEQUANTIZE=token_scale is not None, HAS_BIAS=bias is not None,
        GROUPS=max(FEWEST_GROUPS, triton.next_power_of_2(experts + 1)), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        STAGES=tile.num_stages, OVERLAP=True, launch_pdl=True,
    )  # fmt: skip
    most_tiles = (min(experts + 1, rows) + rows // tile.block_m) * triton.cdiv(n, tile.block_n)
    grid = (min(most_tiles, sm_count(xq.device) * tile.programs_per_sm),)
    weights = (xq, qdata, scale, experts * padded // 64, group_size, schedule, tile)
    if decode:
        flags.update(
            STEPS=tile.steps, num_warps=tile.num_warps, maxnreg=REGISTERS[tile.num_warps, tile.programs_per_sm]
        )
        launch(grouped_decode, grid, *decode_descriptors(*weights), *operands, **flags)
        return
    unroll = loop_body(tile, schedule, weight_bits == 8, blocks, groups, ahead=False).unroll
    flags.update(GROUP_N=tile.group_n, INT8=weight_bits == 8, num_warps=4, UNROLL=unroll, maxnreg=REGISTERS[8, 1])
    launch(grouped_cooperative, grid, *gemm_descriptors(*weights), *operands, **flags)
