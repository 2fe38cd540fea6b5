"""Triton kernel of the W4A8 linear layer and its launchers, for eager calls on a GPU.

The launchers also run CPU tensors under ``TRITON_INTERPRET=1``, which is how the tests check the kernel without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import k_alignment, pack_block, schedule_bits
from . import gluon_launch
from .launching import launch
from .tile import SM_COUNT, Tile
from .tiles import choose
from .triton_epilogue import add_bias, dequantize_tile
from .triton_split import blocks_in_word, launch_split, takes_words
from .triton_tile import accumulate_tile, tile_position

FOLD_SCALE_BITS = 4  # 8 * 15 = 120 is the largest product of code and scale that an int8 holds with room for the offset


@triton.jit
def w4a8_kernel(
    xq_ptr, token_scale_ptr, qdata_ptr, scale_ptr, zero_ptr, row_scale_ptr, bias_ptr, out_ptr, M, N, K, xq_stride,
    DEQUANTIZE: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP_SIZE: tl.constexpr, PACK: tl.constexpr,
    WEIGHT_BITS: tl.constexpr, FOLD: tl.constexpr, TIMES16: tl.constexpr, ASYMMETRIC: tl.constexpr,
    TILED: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_N: tl.constexpr,
):  # fmt: skip
    """One tile of ``out[m, n]``, contiguous ``[M, N]``: int32 accumulator, or its dequantized value if DEQUANTIZE."""
    tile_m, tile_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.where(m < M, m, 0)
    rows_n = tl.where(n < N, n, 0)
    acc = accumulate_tile(
        xq_ptr, xq_stride, qdata_ptr, scale_ptr, zero_ptr, rows_m, rows_n, K,
        GROUP_SIZE, PACK, WEIGHT_BITS, FOLD, TIMES16, ASYMMETRIC, TILED, EVEN_K, PTX, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    out_ptrs = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    mask = (m < M)[None, :] & (n < N)[:, None]
    if DEQUANTIZE:
        y = dequantize_tile(acc, token_scale_ptr, 1, row_scale_ptr, rows_m, rows_n)
        if HAS_BIAS:
            y = add_bias(y, bias_ptr, rows_n)
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptrs, acc, mask=mask)


def schedule_flags(
    in_features: int,
    group_size: int,
    scale_bits: int,
    weight_bits: int,
    packing: str,
    tile: Tile,
    asymmetric: bool = False,
) -> dict[str, object]:
    """Compile-time flags of ``accumulate_tile`` for one problem; the same for the eager kernel and the template."""
    fold = weight_bits == 4 and group_size != -1 and schedule_bits(scale_bits, asymmetric) <= FOLD_SCALE_BITS
    if group_size == -1:
        # Per channel the x16 sum runs over all of K: |16 q| and |x| are at most 128 each.
        times16 = in_features * 128 * 128 < 2**31
    else:
        # Per group it always fits. One shift per accumulator against half an operation per weight: for narrow tiles.
        times16 = tile.block_m <= 32
    return dict(
        GROUP_SIZE=group_size,
        PACK=pack_block(group_size),
        WEIGHT_BITS=weight_bits,
        FOLD=fold,
        TIMES16=weight_bits == 4 and not fold and times16 and not asymmetric,  # 16 * 15 is no int8
        ASYMMETRIC=asymmetric,
        TILED=packing == "tiled",
        EVEN_K=in_features % k_alignment(group_size) == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        GROUP_N=tile.group_n,
    )


def use_ptx(device: torch.device) -> bool:
    """Whether kernels for this device may hold NVIDIA assembly."""
    return device.type == "cuda" and torch.version.hip is None and not triton.knobs.runtime.interpret


def capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA GPU, 0 for anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def gluon_obstacle(
    in_features: int, group_size: int, scale_bits: int, weight_bits: int, packing: str, device: torch.device,
    asymmetric: bool = False,
) -> Optional[str]:  # fmt: skip
    """Why the Gluon kernels cannot serve a weight on this machine, or None."""
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter does not run Gluon"
    return gluon_launch.missing_feature(capability(device)) or gluon_launch.unsupported_format(
        in_features, group_size, weight_bits, scale_bits, packing, asymmetric
    )


@functools.lru_cache(None)
def device_name(device: torch.device) -> str:
    """Name under which tuned tiles are looked up; empty without a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def pick_tile(
    m: int, n: int, k: int, group_size: int, scale_bits: int, weight_bits: int, device: torch.device, gluon: bool,
    in_parts: bool = True,
) -> Tile:  # fmt: skip
    """Kernel and tile for a problem on a device, from the tables or the rules."""
    sms = gluon_launch.sm_count(device) if device.type == "cuda" else SM_COUNT
    where = (capability(device), device_name(device), gluon, sms)
    return choose(m, n, k, group_size, scale_bits, weight_bits, *where, in_parts)


def _launch(
    out: Tensor,
    xq: Tensor,
    token_scale: Optional[Tensor],
    qdata: Tensor,
    scale: Tensor,
    row_scale: Optional[Tensor],
    bias: Optional[Tensor],
    group_size: int,
    scale_bits: int,
    packing: str,
    tile: Optional[Tile],
    overlap: bool,
    zero_point: Optional[Tensor],
    residual: Optional[Tensor] = None,
) -> None:
    """Fill ``out`` ``[M, N]`` from 2-D activations ``[M, K]`` with contiguous rows; a residual is contiguous."""
    (m, k), n = xq.shape, out.shape[1]
    if m == 0 or n == 0:
        return
    weight_bits, asymmetric = 8 if qdata.dtype is torch.int8 else 4, zero_point is not None
    if tile is None:
        how = (k, group_size, scale_bits, weight_bits, packing, xq.device, asymmetric)
        gluon = scale.dtype is not torch.int16 and gluon_launch.addressable(xq) and gluon_obstacle(*how) is None
        bits = schedule_bits(scale_bits, asymmetric)
        tile = pick_tile(m, n, k, group_size, bits, weight_bits, xq.device, gluon)
    with torch.cuda.device(xq.device) if xq.is_cuda else contextlib.nullcontext():
        if tile.kernel != "triton":
            fused = None if tile.kernel == "decode" else residual
            gluon_launch.launch_gluon(
                out, xq, token_scale, qdata, scale, row_scale, bias, group_size, scale_bits, tile, overlap,
                residual=fused,
            )  # fmt: skip
            if residual is not None and fused is None:
                out.add_(residual)
            return
        flags = schedule_flags(k, group_size, scale_bits, weight_bits, packing, tile, asymmetric)
        flags["PTX"] = use_ptx(xq.device)
        blocks = blocks_in_word(k, group_size, scale.dtype, weight_bits, asymmetric)
        if tile.split_k > 1 or takes_words(tile, blocks):
            early = overlap and capability(xq.device) >= 90
            launch_split(out, xq, token_scale, qdata, scale, row_scale, bias, zero_point, tile, flags, early)
        else:
            grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
            launch(
                w4a8_kernel, grid,
                xq, token_scale, qdata, scale, zero_point, row_scale, bias, out, m, n, k, xq.stride(0),
                DEQUANTIZE=token_scale is not None,
                HAS_BIAS=bias is not None,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **flags,
            )  # fmt: skip
        if residual is not None:
            out.add_(residual)


def rows_of(xq: Tensor) -> Tensor:
    """Activations as 2-D ``[M, K]``, each row contiguous."""
    flat = xq.reshape(-1, xq.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def accumulate_cuda(
    xq: Tensor,
    qdata: Tensor,
    scale: Tensor,
    out_features: int,
    group_size: int,
    scale_bits: int,
    packing: str,
    tile: Optional[Tile] = None,
    overlap: bool = False,
    zero_point: Optional[Tensor] = None,
) -> Tensor:
    """Integer accumulator ``[..., N]`` int32 of int8 activations ``[..., K]`` and a packed weight.

    Weights with zero points run in the plain-Triton kernel everywhere.

    ``tile`` overrides the choice of :func:`pick_tile`; the result does not depend on it. ``overlap`` is that of
    :func:`~intscale_compile.kernels.gluon_launch.launch_gluon`.
    """
    out = xq.new_empty((xq.shape[:-1].numel(), out_features), dtype=torch.int32)
    operands = (rows_of(xq), None, qdata.contiguous(), scale.contiguous(), None, None)
    zero_point = None if zero_point is None else zero_point.contiguous()
    _launch(out, *operands, group_size, scale_bits, packing, tile, overlap, zero_point)
    return out.view(*xq.shape[:-1], out_features)


def linear_cuda(
    xq: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    bias: Optional[Tensor],
    out_features: int,
    group_size: int,
    scale_bits: int,
    packing: str,
    dtype: torch.dtype,
    tile: Optional[Tile] = None,
    overlap: bool = False,
    zero_point: Optional[Tensor] = None,
    residual: Optional[Tensor] = None,
) -> Tensor:
    """``acc * token_scale * row_scale (+ bias)``, computed in fp32 and rounded once to ``dtype``; ``[..., N]``.

    ``residual``, of that shape and dtype, is added to the rounded value, in the GEMM's epilogue where it has one.
    """
    out = xq.new_empty((xq.shape[:-1].numel(), out_features), dtype=dtype)
    _launch(
        out,
        rows_of(xq),
        token_scale.reshape(-1).contiguous(),
        qdata.contiguous(),
        scale.contiguous(),
        row_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        group_size,
        scale_bits,
        packing,
        tile,
        overlap,
        None if zero_point is None else zero_point.contiguous(),
        None if residual is None else residual.reshape(out.shape).contiguous(),
    )
    return out.view(*xq.shape[:-1], out_features)
