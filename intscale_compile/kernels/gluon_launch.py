"""Launchers of the Gluon kernels, and the conditions under which they can run.

They need a Hopper GPU, a Triton release whose Gluon these kernels were written for, symmetric tiled weights, and activations
that the tensor memory accelerator can address. Everything else has plain-Triton kernels that give the same accumulator.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, Optional

import torch
import triton
from torch import Tensor

from ..format import pack_block
from ..reasons import log_once
from .gluon_tiles import fits_resident, for_output, scale_tiles, scales_in_block
from .launching import collecting, described, launch
from .split_k import take_counters
from .tile import Tile, schedule_name

TRITON_RELEASES = ((3, 6), (3, 7), (3, 8), (3, 9))  # each assembled in tests/kernels/test_gluon_assembly.py
MAX_PER_CHANNEL_K = 1 << 17  # codes are 16 times too large until the epilogue: 16 * 8 * 127 * K < 2**31
REGISTERS = {
    (4, 1): 168,
    (4, 2): 128,
    (4, 3): 80,
    (8, 1): 168,
    (8, 2): 80,
    (12, 1): 128,
}  # by (warps, programs an SM): a thread's share


class LoopBody(NamedTuple):
    """What the body of a kernel's loop over K holds."""

    unroll: int  # blocks of K
    ahead: bool  # whether each stage is read from shared memory while the products of the one before run; else when they have


# Blocks of K in a body, the first that divides K taken, by (cooperative, SCALES, 8-bit weights). Only a schedule that keeps
# one accumulator gains from several blocks in flight; the others would spill.
_ONE_SUM, _TWO_SUMS = (4, 2, 1), (1,)
UNROLLS = {
    (False, "fold", False): _ONE_SUM, (False, "none", False): _ONE_SUM, (False, "none", True): _ONE_SUM,
    (False, "accumulate", False): _TWO_SUMS, (False, "float", False): _TWO_SUMS,
    (True, "fold", False): _ONE_SUM, (True, "none", False): _ONE_SUM, (True, "none", True): (1,),
    (True, "accumulate", False): (2, 1), (True, "float", False): (1,),
}  # fmt: skip
# As many blocks of K where each stage is read ahead: the first of a body is not, so that longer bodies gain more.
UNROLLS_AHEAD = (8, 4, 2)


def loop_body(tile: Tile, scales: str, int8: bool, blocks: int, groups: int = 1, ahead: bool = True) -> LoopBody:
    """The body of ``tile``'s loop, for a K of ``blocks`` with ``groups`` group scales in each; ``scales`` is SCALES.

    Stages are read ahead by two consumers of 128 tokens with one sum. Those of 256 tokens, or a third consumer, fill the time
    with other products (benchmarks/results/2026-11-28-h200-ahead.md). Gated launches and experts, with ``ahead`` False, do
    not: they were not run on a GPU so.
    """
    cooperative, two_sums = tile.kernel == "cooperative", scales in ("accumulate", "float")
    if ahead and cooperative and tile.block_m == 128 and tile.num_warps == 8 and not (int8 or two_sums):
        for unroll in UNROLLS_AHEAD:
            # A part of K has whole bodies: short ones make parts of one length.
            if blocks % unroll == 0 and (unroll <= 4 or blocks // unroll % tile.split_k == 0):
                return LoopBody(unroll, True)
    if groups > 1 and two_sums:
        return LoopBody(1, False)
    return LoopBody(next(u for u in UNROLLS[cooperative, scales, int8] if blocks % u == 0), False)


@functools.lru_cache(None)
def missing_feature(capability: int) -> Optional[str]:
    """Why this machine cannot run the Gluon kernels, or None."""
    if capability != 90:
        return f"the GPU has capability {capability}, the Gluon kernels are for 90 (Hopper)"
    reason = _missing_in_triton()
    if reason is not None:
        log_once(logging.WARNING, f"plain Triton instead of Gluon: {reason}")
    return reason


def _missing_in_triton() -> Optional[str]:
    """What keeps the installed Triton from running the Gluon kernels, or None."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release not in TRITON_RELEASES:
        known = ", ".join(".".join(map(str, numbers)) for numbers in TRITON_RELEASES)
        return f"the Gluon kernels were checked with Triton {known}, not with {triton.__version__}"
    try:
        # Gluon's interface moves: what an unforeseen release lacks shows when its kernels are imported.
        from . import gluon_decode, gluon_gemm  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__} lacks parts of Gluon: {error}"
    return None


def unsupported_format(
    in_features: int, group_size: int, weight_bits: int, scale_bits: int, packing: str, asymmetric: bool = False
) -> Optional[str]:
    """Why a weight's format has no Gluon kernel, or None."""
    if asymmetric:
        return "zero points"
    if packing != "tiled":
        return "the weight is not in tiled packing"
    if in_features % 128:
        return f"{in_features} input features are not a multiple of 128"
    if group_size == 256 and in_features % 256:
        return f"{in_features} input features are not a multiple of the group size 256"
    if group_size == -1 and in_features > MAX_PER_CHANNEL_K:
        return f"{in_features} input features per channel"
    if scale_bits > 8:
        return f"group scales of {scale_bits} bits"
    return None


def scale_schedule(group_size: int, scale_bits: int, weight_bits: int, decode: bool, float_scale: bool = False) -> str:
    """The SCALES parameter of the kernels."""
    name = schedule_name(group_size, scale_bits, weight_bits)
    if name in ("none", "int8"):
        return "none"
    if float_scale:
        return "float"
    return "accumulate" if decode else name


@functools.lru_cache(None)
def _layout(block: tuple[int, ...], bits: int, swizzled: bool) -> Any:
    # Only GPUs need Triton.
    from triton.experimental.gluon import language as gl

    if swizzled:
        return gl.NVMMASharedLayout.get_default_for(list(block), {8: gl.int8, 16: gl.int16}[bits])
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=len(block))


def descriptor(
    base: Tensor, shape: list[int], strides: list[int], block: tuple[int, ...], swizzled: bool = True
) -> Any:
    """A tensor descriptor of ``base``'s memory whose copies are blocks of ``block`` elements; for ``wgmma`` if swizzled."""
    # Only GPUs need Triton.
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _layout(block, base.element_size() * 8, swizzled)
    return TensorDescriptor(described(base), shape, strides, list(block), layout)


def _decode(
    grid_limit: int, m: int, n: int, tile: Tile, operands: dict[str, Any], overlap: bool, flags: dict[str, Any]
):
    # Imports Triton, which only GPUs need.
    from .gluon_decode import gemm_decode

    xq, qdata, scale, blocks = operands["xq"], operands["qdata"], operands["scale"], operands["blocks"]
    group_size = operands["group_size"]
    descriptors = decode_descriptors(xq, qdata, scale, qdata.shape[0] // 64, group_size, flags["SCALES"], tile)
    resident = fits_resident(tile, flags["SCALES"], blocks, scales_in_block(group_size))
    tiles = triton.cdiv(n, tile.block_n)
    programs = min(tiles, grid_limit)
    launch(
        gemm_decode, (programs, triton.cdiv(m, tile.block_m)),
        *descriptors, *operands["epilogue"], m, n,
        BLOCKS=blocks, GROUP_SIZE=group_size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages,
        STEPS=tile.steps, OVERLAP=overlap, RESIDENT=tiles > programs and resident,
        num_warps=tile.num_warps, maxnreg=REGISTERS[tile.num_warps, tile.programs_per_sm], launch_pdl=overlap, **flags,
    )  # fmt: skip


def decode_descriptors(
    xq: Tensor, qdata: Tensor, scale: Tensor, row_tiles: int, group_size: int, schedule: str, tile: Tile
) -> tuple[Any, Any, Any]:
    """Descriptors of activations, codes and group scales for the decode kernels; ``row_tiles`` counts those of all experts."""
    depth, blocks, row_bytes = 4 * tile.steps, xq.shape[1] // 128, pack_block(group_size) // 2
    shape, strides, box = [blocks, xq.shape[0], 128], [128, xq.stride(0), 1], (depth, tile.block_m, 64)
    x_desc = descriptor(xq, shape, strides, box, swizzled=row_bytes == 64)
    codes, shape = qdata.view(torch.int8), [row_tiles * blocks, 4096 // row_bytes, row_bytes]
    w_desc = descriptor(codes, shape, [4096, row_bytes, 1], (depth, tile.block_n, row_bytes))
    # Per channel there are no group scales to copy; the descriptor is never used, but has to describe something.
    scales = qdata.view(torch.uint8) if schedule == "none" else scale
    rows = 64 * scales_in_block(group_size)
    s_desc = descriptor(scales, [row_tiles * blocks, rows], [rows, 1], (depth, tile.block_n), swizzled=False)
    return x_desc, w_desc, s_desc


def gemm_descriptors(
    xq: Tensor,
    qdata: Tensor,
    scale: Tensor,
    row_tiles: int,
    group_size: int,
    schedule: str,
    tile: Tile,
    gated: bool = False,
) -> tuple[Any, Any, Any]:
    """As :func:`decode_descriptors` for the kernels of many tokens; ``gated`` says that a tile has rows of gate and of up."""
    k = xq.shape[1]
    row_bytes = 128 if qdata.dtype is torch.int8 else pack_block(group_size) // 2
    x_desc = descriptor(xq, [xq.shape[0], k], [xq.stride(0), 1], (tile.block_m // 2, 128))
    # A cooperative tile of gate and up takes 8 rows of each in turns.
    box = (8 if gated and tile.kernel == "cooperative" else 64, row_bytes)
    codes = qdata.view(torch.int8)
    w_desc = descriptor(codes, [codes.numel() // row_bytes, row_bytes], [row_bytes, 1], box)
    scales = qdata.view(torch.uint8) if schedule == "none" else scale
    groups = k // group_size
    shape, strides, block = [row_tiles, groups, 64], [groups * 64, 64, 1], [scale_tiles(tile), 1, 64]
    if gated:  # one copy takes the scales of gate rows and of up rows
        shape, strides = [2, row_tiles // 2, groups, 64], [row_tiles // 2 * groups * 64, *strides]
        block = [2, tile.block_n // 128, 1, 64]
    return x_desc, w_desc, descriptor(scales, shape, strides, tuple(block), swizzled=False)


def _gemm(grid_limit: int, m: int, n: int, tile: Tile, operands: dict[str, Any], overlap: bool, flags: dict[str, Any]):
    # Imports Triton, which only GPUs need.
    from .gluon_cooperative import gemm_cooperative
    from .gluon_gemm import gemm_pipelined, gemm_specialized

    xq, qdata, scale, blocks = operands["xq"], operands["qdata"], operands["scale"], operands["blocks"]
    int8, group_size = qdata.dtype is torch.int8, operands["group_size"]
    cooperative, gated = tile.kernel == "cooperative", flags["GATED"] != "none"
    descriptors = gemm_descriptors(
        xq, qdata, scale, qdata.shape[0] // 64, group_size, flags["SCALES"], tile, gated=gated
    )
    groups = scales_in_block(group_size)
    unroll, ahead = loop_body(tile, flags["SCALES"], int8, blocks, groups, ahead=not gated)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    split_k = min(tile.split_k, blocks // unroll)
    partial = counters = None
    if split_k > 1:
        dtype = torch.float32 if flags["SCALES"] == "float" else torch.int32
        partial = torch.empty(tiles * split_k * tile.block_m * tile.block_n, dtype=dtype, device=xq.device)
        sums = tile.num_warps // 4 if cooperative else 1  # each consumer has its own
        counters = take_counters(xq.device, tiles * sums)
    out, residual = operands["epilogue"][0], operands["residual"]
    stores: tuple[Any, ...] = ()
    if cooperative:
        flags = flags | {"TMA_STORE": copies_results(out, residual), "AHEAD": ahead}
        box = (tile.block_m // 2, 32 if gated else 64)
        stores = tuple(
            descriptor(x, list(out.shape), [out.stride(0), 1], box) if flags["TMA_STORE"] and x is not None else None
            for x in (out, residual)
        )
    kernels = {"specialized": gemm_specialized, "pipelined": gemm_pipelined, "cooperative": gemm_cooperative}
    persistent = tile.kernel != "pipelined"
    options = dict(maxnreg=REGISTERS[tile.num_warps, tile.programs_per_sm]) if persistent else {}
    grid = tiles * split_k
    launch(
        kernels[tile.kernel], (min(grid, grid_limit) if persistent else grid,),
        *descriptors, *stores, *operands["epilogue"], residual, partial, counters, m, n,
        BLOCKS=blocks, GROUP_SIZE=group_size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        STAGES=tile.num_stages, GROUP_N=tile.group_n, SPLIT_K=split_k, UNROLL=unroll, OVERLAP=overlap, INT8=int8,
        num_warps=4 if cooperative else tile.num_warps, launch_pdl=overlap, **options, **flags,
    )  # fmt: skip


def copies_results(out: Tensor, residual: Optional[Tensor]) -> bool:
    """Whether the tensor memory accelerator can write these results, and read the residual."""
    aligned = all(x is None or collecting() or x.data_ptr() % 16 == 0 for x in (out, residual))
    return out.element_size() == 2 and out.shape[1] % 8 == 0 and aligned


def launch_gluon(
    out: Tensor,
    xq: Tensor,
    token_scale: Optional[Tensor],
    qdata: Tensor,
    scale: Tensor,
    row_scale: Optional[Tensor],
    bias: Optional[Tensor],
    group_size: int,
    scale_bits: int,
    tile: Tile,
    overlap: bool = False,
    gated: str = "none",
    residual: Optional[Tensor] = None,
) -> None:
    """Fill ``out`` ``[M, N]`` (gated: ``[M, N/2]``) as the plain-Triton launcher does, with one of the Gluon kernels.

    Args:
        xq: int8 ``[M, K]``, rows contiguous and a multiple of 16 bytes apart, 16-byte aligned.
        qdata, scale: tiled packing; an fp32 ``scale`` selects float group scales (for comparison).
        tile: from :func:`~intscale_compile.kernels.tiles.choose_tile`; ``kernel`` names the kernel.
        overlap: begin to read weights before the kernels launched before this one have ended (programmatic dependent
            launch). Wrong if one of those writes the weights.
        gated: activation of the gate rows, for a weight whose first half of rows are gate and second half up rows; N/2 is
            a multiple of 64, and ``tile`` one of :func:`~intscale_compile.kernels.gluon_tiles.gated_tile` (cooperative ones for
            16-bit outputs).
        residual: contiguous, of the shape and dtype of ``out``; added to the rounded result. Not by the decode kernel.
    """
    (m, k), n = xq.shape, out.shape[1] * (1 if gated == "none" else 2)
    weight_bits = 8 if qdata.dtype is torch.int8 else 4
    decode = tile.kernel == "decode"
    flags = dict(
        SCALES=scale_schedule(group_size, scale_bits, weight_bits, decode, scale.dtype is torch.float32),
        DEQUANTIZE=token_scale is not None,
        HAS_BIAS=bias is not None,
    )
    operands = dict(
        xq=xq, qdata=qdata, scale=scale, blocks=k // 128, group_size=group_size if group_size > 0 else 128,
        epilogue=(out, scale, row_scale, token_scale, bias), residual=residual,
    )  # fmt: skip
    schedule = "int8" if weight_bits == 8 else str(flags["SCALES"])
    tile = for_output(tile, schedule, out.element_size(), scales_in_block(group_size))
    grid_limit = sm_count(xq.device) * tile.programs_per_sm
    if decode:
        _decode(grid_limit, m, n, tile, operands, overlap, flags)
    else:
        _gemm(grid_limit, m, n, tile, operands, overlap, flags | {"GATED": gated, "HAS_RESIDUAL": residual is not None})


@functools.lru_cache(None)
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def addressable(xq: Tensor) -> bool:
    """Whether the tensor memory accelerator can read these activations."""
    return (collecting() or xq.data_ptr() % 16 == 0) and xq.stride(0) % 16 == 0
