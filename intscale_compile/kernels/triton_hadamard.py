"""Triton kernels of ``intscale::hadamard`` and ``intscale::hadamard_quantize``, and of ``quantize_static`` in eager calls.

A row (or a piece of the flat activation) lies in the registers of one program. A butterfly at stride ``s`` is a reshape to
``[..., 2, s]``, a split along the 2, a sum and a difference, and the way back; Triton keeps as many of them as it can inside
a thread and exchanges through shared memory between them. Only IEEE sums in a fixed order: the bits are the reference's.
"""

from __future__ import annotations

import contextlib
import math
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .quantize_per_token import SMALLEST_AMAX

# Elements of a row that one program holds: 64 registers of each thread of 16 warps. 65536 would spill.
LONGEST_ROW = 32768

# Elements for each warp: 16 registers of each thread.
PER_WARP = 512
MOST_WARPS = 16

# Elements for one program of the bare transform, unless a block is larger.
PIECE = 4096


@triton.jit
def butterfly(x, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """``a + b`` and ``a - b`` for entries ``a`` and ``b`` of ``[LENGTH]`` at distance ``STRIDE``."""
    pairs = tl.permute(tl.reshape(x, (LENGTH // (2 * STRIDE), 2, STRIDE)), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (LENGTH,))


@triton.jit
def transform(x, LENGTH: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr):
    """Transform blocks of ``2 ** STAGES`` of fp32 ``[LENGTH]``; ``NORM`` is ``2 ** (-STAGES / 2)``."""
    for stage in tl.static_range(STAGES):
        x = butterfly(x, LENGTH, 1 << stage)
    return x * NORM if STAGES > 0 else x


@triton.jit
def hadamard_kernel(x_ptr, out_ptr, count, STAGES: tl.constexpr, NORM: tl.constexpr, LENGTH: tl.constexpr):
    """Piece ``program_id(0)`` of the flat activation; pieces are whole blocks."""
    i = tl.program_id(0).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    y = transform(x, LENGTH, STAGES, NORM)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def hadamard_quantize_kernel(
    x_ptr, xq_ptr, token_scale_ptr, activation_scale_ptr, K, x_stride, activation_scale_stride,
    STAGES: tl.constexpr, NORM: tl.constexpr, LENGTH: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``: the transform, rounded to the dtype of ``x``, then the IEEE operations of the quantizers.

    Without ``activation_scale_ptr`` those of ``quantize_per_token_aten``, with it those of ``quantize_static_aten``.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, LENGTH)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    x = transform(x, LENGTH, STAGES, NORM).to(x_ptr.dtype.element_ty).to(tl.float32)
    amax = tl.max(tl.abs(x), 0)
    finite = (amax < float("inf")) & (tl.max((x != x).to(tl.int32), 0) == 0)
    if activation_scale_ptr is None:
        amax = tl.maximum(amax, SMALLEST)
        token_scale = amax * (1.0 / 127.0)
        y = x * (tl.div_rn(1.0, amax) * 127.0)
    else:
        token_scale = tl.load(activation_scale_ptr + row * activation_scale_stride)
        y = x * tl.div_rn(1.0, tl.maximum(token_scale, SMALLEST))
    y = tl.minimum(tl.maximum(y, -128.0), 128.0)
    # Adding 1.5 * 2**23 rounds to an integer, ties to even; the kernel is compiled without contraction to multiply-add.
    y = (y + 12582912.0) - 12582912.0
    y = tl.minimum(tl.maximum(y, -127.0), 127.0)
    tl.store(xq_ptr + row * K + k, y.to(tl.int8), mask=k < K)
    tl.store(token_scale_ptr + row, tl.where(finite, token_scale, float("nan")))


def form(size: int, length: int) -> dict:
    """``constexpr`` arguments and warps for blocks of ``size`` in programs of at least ``length`` elements."""
    length = max(16, size, triton.next_power_of_2(length))
    warps = min(MOST_WARPS, max(1, length // PER_WARP))
    constants = dict(STAGES=size.bit_length() - 1, NORM=1.0 / math.sqrt(size), LENGTH=length)
    return dict(**constants, num_warps=warps, enable_fp_fusion=False)


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def hadamard_cuda(x: Tensor, size: int) -> Tensor:
    """The transform of a checked activation ``[..., K]``, in its dtype."""
    flat = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = form(size, min(PIECE, max(1, flat.numel())))
    if flat.numel():
        with _on(x):
            grid = (triton.cdiv(flat.numel(), options["LENGTH"]),)
            launch(hadamard_kernel, grid, flat, out, flat.numel(), **options)
    return out


def hadamard_quantize_cuda(x: Tensor, size: int, activation_scale: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """int8 ``[..., K]`` and fp32 ``[..., 1]`` of a checked activation with ``K`` up to :data:`LONGEST_ROW`.

    ``size`` 1 quantizes without a transform; without ``activation_scale`` the scales are per token.
    """
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    xq = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    token_scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if activation_scale is not None:
        activation_scale = activation_scale.reshape(-1)
    stride = 0 if activation_scale is None or activation_scale.numel() == 1 else activation_scale.stride(0)
    if rows.shape[0]:
        with _on(x):
            launch(
                hadamard_quantize_kernel, (rows.shape[0],),
                rows, xq, token_scale, activation_scale, columns, rows.stride(0), stride,
                SMALLEST=SMALLEST_AMAX, **form(size, columns),
            )  # fmt: skip
    return xq, token_scale
