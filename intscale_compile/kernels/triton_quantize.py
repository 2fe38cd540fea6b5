"""Triton kernel of ``intscale::quantize_per_token`` for eager calls on a GPU: one pass over the activation instead of nine.

``generate`` of transformers runs the prompt eagerly. Compiled graphs decompose the op and fuse it into its producer.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch

LONGEST_ROW = 65536  # elements of a row that one program holds in registers


@triton.jit
def quantize_kernel(x_ptr, xq_ptr, scale_ptr, K, x_stride, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    """Row ``program_id(0)`` of ``x``: the same IEEE operations as ``quantize_per_token_aten``, hence the same bits."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST)
    finite = (amax < float("inf")) & (tl.max((x != x).to(tl.int32), 0) == 0)
    y = x * (tl.div_rn(1.0, amax) * 127.0)
    # Adding 1.5 * 2**23 rounds to an integer, ties to even; the kernel is compiled without contraction to multiply-add.
    y = (y + 12582912.0) - 12582912.0
    y = tl.minimum(tl.maximum(y, -127.0), 127.0)
    tl.store(xq_ptr + row * K + k, y.to(tl.int8), mask=k < K)
    tl.store(scale_ptr + row, tl.where(finite, amax * (1.0 / 127.0), float("nan")))


def quantize_per_token_cuda(x: Tensor, smallest_amax: float) -> tuple[Tensor, Tensor]:
    """int8 ``[..., K]`` and fp32 ``[..., 1]`` of a checked activation ``[..., K]`` with ``K`` up to :data:`LONGEST_ROW`."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    xq = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if rows.shape[0]:
        block = max(16, triton.next_power_of_2(columns))
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            launch(
                quantize_kernel, (rows.shape[0],),
                rows, xq, scale, columns, rows.stride(0), SMALLEST=smallest_amax, BLOCK=block,
                num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
            )  # fmt: skip
    return xq, scale
