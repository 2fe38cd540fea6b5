"""Launcher of ``w4a8_gated_linear`` on a GPU, and its plain-Triton kernel.

The Gluon kernels serve more than 16 tokens on Hopper; the kernel here everything else: other GPUs, other formats, halves
that are not whole tiles of 64 rows. It differs from ``w4a8_kernel`` in the rows that a tile takes: half of them from the
gate half of the weight, half from the up half. Both give the same accumulator and the same float operations after it.
"""

from __future__ import annotations

import contextlib
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import schedule_bits
from . import gluon_launch
from .gluon_tiles import DECODE_TOKENS, choose_gated_tile, gated_tile, without_copies
from .launching import launch
from .tile import Tile, schedule_name
from .triton_epilogue import add_bias, dequantize_tile
from .triton_gemm import gluon_obstacle, pick_tile, rows_of, schedule_flags, use_ptx
from .triton_tile import accumulate_tile, tile_position


@triton.jit
def gate_activation(gate, GATED: tl.constexpr):
    """SiLU or GELU in fp32, term for term as in ``gluon_common.gate_activation``."""
    if GATED == "silu":
        y = gate / (1.0 + tl.exp(-gate))
    elif GATED == "gelu":
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2 u)); 2 * sqrt(2 / pi) = 1.5957691216057308.
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        y = gate / (1.0 + tl.exp(-u))
    return y


@triton.jit
def w4a8_gated_kernel(
    xq_ptr, token_scale_ptr, qdata_ptr, scale_ptr, zero_ptr, row_scale_ptr, bias_ptr, out_ptr, M, N, K, xq_stride,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP_SIZE: tl.constexpr, PACK: tl.constexpr,
    WEIGHT_BITS: tl.constexpr, FOLD: tl.constexpr, TIMES16: tl.constexpr, ASYMMETRIC: tl.constexpr,
    TILED: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_N: tl.constexpr,
):  # fmt: skip
    """One tile of ``out[m, i]``, contiguous ``[M, N/2]``: the activation of a gate row times its up row."""
    HALF: tl.constexpr = BLOCK_N // 2
    columns = N // 2
    tile_m, tile_n = tile_position(tl.program_id(0), M, columns, BLOCK_M, HALF, GROUP_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tile_n * HALF + tl.arange(0, HALF)
    rows_m = tl.where(m < M, m, 0)
    row = tl.arange(0, BLOCK_N)
    column = tile_n * HALF + row % HALF
    rows_n = tl.where(column < columns, column, 0) + row // HALF * columns
    acc = accumulate_tile(
        xq_ptr, xq_stride, qdata_ptr, scale_ptr, zero_ptr, rows_m, rows_n, K,
        GROUP_SIZE, PACK, WEIGHT_BITS, FOLD, TIMES16, ASYMMETRIC, TILED, EVEN_K, PTX, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    y = dequantize_tile(acc, token_scale_ptr, 1, row_scale_ptr, rows_m, rows_n)
    if HAS_BIAS:
        y = add_bias(y, bias_ptr, rows_n)
    gate, up = tl.split(tl.permute(tl.reshape(y, [2, HALF, BLOCK_M]), (1, 2, 0)))
    y = gate_activation(gate, GATED) * up
    out_ptrs = out_ptr + m.to(tl.int64)[None, :] * columns + i[:, None]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (i < columns)[:, None])


def pick_gated_tile(
    m: int, n: int, k: int, group_size: int, scale_bits: int, weight_bits: int, device: torch.device, gluon: bool,
    out_bytes: int = 2,
) -> Tile:  # fmt: skip
    """Kernel and tile for ``m`` tokens and ``n`` rows of gate and up together: those of the linear, where they can run.

    ``gluon`` says whether the Gluon kernels can run this weight here, see :func:`gated_obstacle`; ``out_bytes`` is the width of
    an element of the output, which cooperative tiles need to be 2.
    """
    gluon = gluon and m > DECODE_TOKENS
    tile = pick_tile(m, n, k, group_size, scale_bits, weight_bits, device, gluon, in_parts=False)
    schedule = schedule_name(group_size, scale_bits, weight_bits)
    if tile.kernel != "triton" and gated_tile(tile, schedule) != tile:
        limits = (gluon_launch.sm_count(device),) if device.type == "cuda" else ()
        tile = choose_gated_tile(m, n, k, schedule, *limits)
    return without_copies(tile, schedule) if tile.kernel == "cooperative" and out_bytes != 2 else tile


def gated_obstacle(
    n: int, k: int, group_size: int, scale_bits: int, weight_bits: int, packing: str, device: torch.device,
    asymmetric: bool = False,
) -> Optional[str]:  # fmt: skip
    """Why the Gluon kernels cannot run a gated linear of ``n`` rows of gate and up together, or None."""
    if n % 128:
        return f"{n // 2} gated output features are not whole tiles of 64"
    return gluon_obstacle(k, group_size, scale_bits, weight_bits, packing, device, asymmetric)


def gated_linear_cuda(
    xq: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    bias: Optional[Tensor],
    activation: str,
    out_features: int,
    group_size: int,
    scale_bits: int,
    packing: str,
    dtype: torch.dtype,
    tile: Optional[Tile] = None,
    overlap: bool = False,
    zero_point: Optional[Tensor] = None,
) -> Tensor:
    """``act(gate) * up`` of int8 ``[..., K]`` and a packed weight ``[2 I, K]``, fp32 rounded once to ``dtype``; ``[..., I]``.

    ``tile`` overrides the choice of :func:`pick_gated_tile`; ``overlap`` is that of
    :func:`~intscale_compile.kernels.gluon_launch.launch_gluon`.
    """
    x = rows_of(xq)
    (m, k), columns = x.shape, out_features // 2
    out = xq.new_empty((m, columns), dtype=dtype)
    result = out.view(*xq.shape[:-1], columns)
    if m == 0 or columns == 0:
        return result
    weight_bits, asymmetric = 8 if qdata.dtype is torch.int8 else 4, zero_point is not None
    if tile is None:
        gluon = (
            gated_obstacle(out_features, k, group_size, scale_bits, weight_bits, packing, xq.device, asymmetric) is None
            and scale.dtype is not torch.int16
            and gluon_launch.addressable(x)
        )
        bits = schedule_bits(scale_bits, asymmetric)
        tile = pick_gated_tile(m, out_features, k, group_size, bits, weight_bits, xq.device, gluon, dtype.itemsize)
    token_scale, qdata, scale = token_scale.reshape(-1).contiguous(), qdata.contiguous(), scale.contiguous()
    row_scale, bias = row_scale.contiguous(), None if bias is None else bias.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    with torch.cuda.device(xq.device) if xq.is_cuda else contextlib.nullcontext():
        if tile.kernel != "triton":
            gluon_launch.launch_gluon(
                out, x, token_scale, qdata, scale, row_scale, bias, group_size, scale_bits, tile, overlap, activation
            )
            return result
        grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(columns, tile.block_n // 2),)
        launch(
            w4a8_gated_kernel, grid,
            x, token_scale, qdata, scale, zero_point, row_scale, bias, out, m, out_features, k, x.stride(0),
            GATED=activation,
            HAS_BIAS=bias is not None,
            PTX=use_ptx(xq.device),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **schedule_flags(k, group_size, scale_bits, weight_bits, packing, tile, asymmetric),
        )  # fmt: skip
    return result
