"""Keys and values of a cache as int8 codes: how a float model writes and reads them.

A graph of an integer-only model has ``int_quantize`` and the codes themselves in their place: the pass over attention reads
through these two ops. In a float model they are an int8 cache with one dyadic scale per token and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import exponent, mantissa, quantize_rows
from .define import integer_op

FLOAT_FRACTION = 24  # fraction bits with which a float model's keys are quantized


@integer_op(
    "cache_quantize(Tensor x) -> (Tensor, Tensor)",
    lambda x: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.int32)),
)
def CACHE_QUANTIZE_OP(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[..., D]`` and dyadic scales ``[..., 1]`` of floating point keys or values."""
    wide = (x.to(torch.float64) * 2.0**FLOAT_FRACTION).round().clamp(-(2.0**54), 2.0**54).to(torch.int64)
    return quantize_rows(wide, FLOAT_FRACTION)


@integer_op(
    "cache_dequantize(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor",
    lambda codes, scale, dtype: codes.new_empty(codes.shape, dtype=dtype),
)
def CACHE_DEQUANTIZE_OP(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The floating point values of codes."""
    factor = torch.ldexp(mantissa(scale).to(torch.float64), -exponent(scale))
    return (codes.to(torch.float64) * factor).to(dtype)
