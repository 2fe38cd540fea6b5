"""From the activation to the output in one call on a GPU: quantization and product as one prepared sequence of launches.

What an eager quantized layer runs where nothing but its result is wanted: no gradient, no mode that looks at operators. The
kernels and the bits are those of the ops ``quantize_*``, ``hadamard_quantize``, ``w4a8_linear`` and ``w4a8_grouped_linear``.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .abi import KERNEL_ABI
from .hadamard import hadamard_quantize_on_gpu
from .quantize_per_token import quantize_per_token_on_gpu
from .quantize_static import quantize_static_on_gpu
from .w4a8_grouped import grouped_on_gpu
from .w4a8_linear import linear_on_gpu


def quantize_on_gpu(x: Tensor, rotation: int, activation_scale: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """int8 codes and fp32 token scales of ``x``, rotated in blocks of ``rotation`` where that is not 0."""
    if rotation:
        return hadamard_quantize_on_gpu(x, rotation, activation_scale)
    if activation_scale is not None:
        return quantize_static_on_gpu(x, activation_scale)
    return quantize_per_token_on_gpu(x)


def linear_from_activation(
    x: Tensor, qdata: Tensor, scale: Tensor, row_scale: Tensor, zero_point: Optional[Tensor],
    activation_scale: Optional[Tensor], bias: Optional[Tensor], rotation: int, out_features: int, group_size: int,
    scale_bits: int, packing: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``intscale::w4a8_linear`` of the quantized ``x`` ``[..., K]``; ``[..., N]`` in ``dtype``."""
    xq, token_scale = quantize_on_gpu(x, rotation, activation_scale)
    return linear_on_gpu(
        xq, token_scale, qdata, scale, row_scale, bias, out_features, group_size, scale_bits, packing, dtype, KERNEL_ABI,
        zero_point=zero_point,
    )  # fmt: skip


def grouped_from_activation(
    x: Tensor, qdata: Tensor, scale: Tensor, row_scale: Tensor, zero_point: Optional[Tensor],
    activation_scale: Optional[Tensor], bias: Optional[Tensor], offsets: Tensor, row_index: Optional[Tensor],
    out_index: Optional[Tensor], rotation: int, out_features: int, group_size: int, scale_bits: int, packing: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``intscale::w4a8_grouped_linear`` of the quantized ``x`` ``[tokens, K]``; ``[rows, N]`` in ``dtype``.

    ``activation_scale`` is one entry for each row of ``x``, fp32 ``[tokens, 1]``.
    """
    xq, token_scale = quantize_on_gpu(x, rotation, activation_scale)
    return grouped_on_gpu(
        xq, token_scale, qdata, scale, row_scale, bias, offsets, out_features, group_size, scale_bits, packing, dtype,
        KERNEL_ABI, row_index, out_index, zero_point=zero_point,
    )  # fmt: skip
