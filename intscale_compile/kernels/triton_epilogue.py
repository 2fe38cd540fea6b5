"""Triton device functions of the float epilogue, as source text also part of the Inductor template (``triton_tile``)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize_tile(acc, token_scale_ptr, token_scale_stride, row_scale_ptr, rows_m, rows_n):
    """``acc * token_scale * row_scale`` in fp32, ``[BLOCK_N, BLOCK_M]``: the only float arithmetic before the bias."""
    token_scale = tl.load(token_scale_ptr + rows_m.to(tl.int64) * token_scale_stride)
    row_scale = tl.load(row_scale_ptr + rows_n)
    return acc.to(tl.float32) * token_scale[None, :] * row_scale[:, None]


@triton.jit
def add_bias(y, bias_ptr, rows_n):
    """``y + bias`` in fp32; bias is ``[N]`` in any float dtype."""
    return y + tl.load(bias_ptr + rows_n).to(tl.float32)[:, None]
