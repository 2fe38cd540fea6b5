"""The quantized linear layer as a function: what ``F.linear`` does with an ``IntScaleTensor``."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedOpError
from ..integrations.torch_state import differentiates, is_traced
from ..kernels.arguments import LinearArguments
from ..kernels.hadamard import HADAMARD_OP, HADAMARD_QUANTIZE_OP
from ..kernels.quantize_per_token import OP as QUANTIZE_OP
from ..kernels.quantize_per_token import check_activation, quantize_per_token_aten
from ..kernels.quantize_static import STATIC_OP, quantize_static_aten
from ..kernels.w4a8_linear import LINEAR_OP
from ..ops import KERNEL_ABI, register_inductor
from .eager import eager_linear
from .intscale_tensor import IntScaleTensor
from .transforms import transformed


def linear(x: Tensor, weight: IntScaleTensor, bias: Optional[Tensor] = None) -> Tensor:
    """``x @ weight.T + bias`` with activations quantized to int8: per token, or with the weight's static scale.

    Where the weight is rotated, the activation is rotated first: block Hadamard transforms, see ``kernels.hadamard``. Where
    it has an input order, the features of the activation are gathered in that order first.

    Args:
        x: fp32, bf16 or fp16 ``[..., K]``.
        weight: 2-D ``[N, K]``, not transposed.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``; under autocast in its dtype, as ``F.linear`` does. The gradient of ``x``
        goes straight through the quantizer.

    Raises:
        InputError: wrong dtype, device or number of features.
        UnsupportedOpError: the weight is a stack, or transposed; torch.jit traces.
    """
    if not torch.compiler.is_compiling():
        y = eager_linear(x, weight, bias)
        if y is not None:
            return y
        if is_traced():
            raise UnsupportedOpError(
                "torch.jit.trace cannot keep a quantized weight (saving the trace ends the process): use torch.export, see "
                "docs/export.md."
            )
    _check_operands(x, weight, bias)
    if differentiates():
        return transformed(linear, x, weight, bias)
    xq, token_scale, watched = quantize_activation(x, weight.rotation, weight.activation_scale, weight.input_order)
    return LINEAR_OP(
        *LinearArguments(
            xq=xq,
            token_scale=token_scale,
            qdata=weight.qdata,
            scale=weight.scale,
            row_scale=weight.per_tensor_scale,
            bias=bias,
            out_features=weight.out_features,
            group_size=weight.group_size,
            scale_bits=weight.scale_bits,
            packing=weight.packing_format,
            dtype=_result_dtype(x),
            abi=KERNEL_ABI,
            ste_input=watched,
            zero_point=weight.zero_point,
        )
    )


def _check_operands(x: Tensor, weight: IntScaleTensor, bias: Optional[Tensor]) -> None:
    """Raise what :func:`linear` raises."""
    check_activation(x)
    if weight.dim() != 2:
        raise UnsupportedOpError(
            f"linear needs a 2-D [N, K] weight, not one of shape {tuple(weight.shape)}: select one expert first."
        )
    if weight.transposed:
        raise UnsupportedOpError(
            "linear needs a 2-D [N, K] weight, not a transposed one, whose group scales lie along the output dimension: leave a "
            "weight that is used in both directions out of quantize_ (filter_fn), or give the other direction its own parameter."
        )
    if x.shape[-1] != weight.in_features:
        raise InputError(
            f"the activation has {x.shape[-1]} features, the weight {weight.in_features} (shape {tuple(weight.shape)})."
        )
    if bias is not None and tuple(bias.shape) != (weight.out_features,):
        raise InputError(f"the bias has shape {tuple(bias.shape)}, the weight {weight.out_features} output features.")
    if x.device != weight.device:
        raise InputError(f"the activation is on {x.device}, the weight on {weight.device}: move them together.")


def quantize_activation(
    x: Tensor, rotation: int = 0, activation_scale: Optional[Tensor] = None, input_order: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """int8 codes and fp32 token scales of ``x``, rotated in blocks of ``rotation`` where that is not 0, or gathered in the
    order ``input_order``.

    Our ops in eager mode; while a graph is traced, the aten form of the quantizers. The third result is the tensor that
    the gradient of the product goes to: ``x``, rotated or gathered, or None where autograd does not watch.
    """
    watched = torch.is_grad_enabled() and x.requires_grad
    if input_order is not None:
        x = x.index_select(-1, input_order.view(-1))
    if rotation and not watched:
        return *HADAMARD_QUANTIZE_OP(x, rotation, activation_scale), None
    rotated = HADAMARD_OP(x, rotation) if rotation else x
    if torch.compiler.is_compiling():
        register_inductor()
        with torch.no_grad():
            quantized = _quantize_aten(rotated, activation_scale)
    else:
        quantized = QUANTIZE_OP(rotated) if activation_scale is None else STATIC_OP(rotated, activation_scale)
    return *quantized, rotated if watched else None


def _quantize_aten(x: Tensor, activation_scale: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    return quantize_per_token_aten(x) if activation_scale is None else quantize_static_aten(x, activation_scale)


def _result_dtype(x: Tensor) -> torch.dtype:
    """What ``F.linear`` would return; the activation itself is quantized as it is, without a rounding before."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
