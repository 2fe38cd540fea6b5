"""``intscale::quantize_static``: activations to int8 with a scale that calibration has fixed.

Like ``quantize_per_token`` it exists so that graphs stay readable, and Inductor decomposes it. Codes do not wait for the
maximum of their row: one pass over the activation instead of two. The row is still reduced, beside the codes, because a
code cannot say NaN: a row with NaN or Inf says it with its token scale, as everywhere in this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .prepared import prepared
from .quantize_per_token import SMALLEST_AMAX, check_activation

torch.library.define("intscale::quantize_static", "(Tensor x, Tensor activation_scale) -> (Tensor, Tensor)")
STATIC_OP = torch.ops.intscale.quantize_static.default


def check_activation_scale(x: Tensor, activation_scale: Tensor) -> None:
    """Raise ``InputError`` unless ``activation_scale`` is fp32 on the device of ``x``, one entry or one for each row."""
    if activation_scale.dtype != torch.float32:
        raise InputError(f"the activation scale is {activation_scale.dtype}, expected float32.")
    if activation_scale.numel() != 1 and tuple(activation_scale.shape) != (*x.shape[:-1], 1):
        raise InputError(
            f"the activation scale has shape {tuple(activation_scale.shape)}; an activation of shape {tuple(x.shape)} "
            "takes one entry, or one for each row."
        )
    if activation_scale.device != x.device:
        raise InputError(
            f"the activation is on {x.device}, its scale on {activation_scale.device}: move them together."
        )


def quantize_static_aten(x: Tensor, activation_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` to ``round(x * (1 / activation_scale))``, ties to even; larger entries saturate at 127.

    A row with NaN or Inf gets the token scale NaN, so that its whole output is NaN.

    Args:
        x: fp32, bf16 or fp16 ``[..., K]``.
        activation_scale: fp32, positive: one entry in any shape, or ``[..., 1]``, one for each row.

    Returns:
        int8 ``[..., K]`` in [-127, 127], and fp32 token scales ``[..., 1]``.
    """
    wide = x.to(torch.float32)
    scale = activation_scale.reshape(()) if activation_scale.numel() == 1 else activation_scale
    token_scale = torch.where(wide.abs().amax(-1, keepdim=True) < float("inf"), scale, float("nan"))
    # A product with the reciprocal: Inductor would rewrite a quotient so, and the two differ in the last bit. In fp64, since
    # Triton's fp32 division is not exact; rounded to fp32 it is the IEEE quotient of fp32.
    inverse = scale.clamp(min=SMALLEST_AMAX).to(torch.float64).reciprocal().to(torch.float32)
    xq = (wide * inverse).round().clamp(-127.0, 127.0).to(torch.int8)
    return xq, token_scale


@torch.library.impl("intscale::quantize_static", "CompositeExplicitAutograd")
def _quantize_static(x: Tensor, activation_scale: Tensor) -> tuple[Tensor, Tensor]:
    check_activation(x)
    check_activation_scale(x, activation_scale)
    return quantize_static_aten(x, activation_scale)


def quantize_static_on_gpu(x: Tensor, activation_scale: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_static_aten`, in one kernel."""
    # Imports Triton, which only GPUs need.
    from .triton_hadamard import LONGEST_ROW, hadamard_quantize_cuda

    check_activation(x)
    check_activation_scale(x, activation_scale)
    if 0 < x.shape[-1] <= LONGEST_ROW:
        return hadamard_quantize_cuda(x, 1, activation_scale)
    return quantize_static_aten(x, activation_scale)


torch.library.impl("intscale::quantize_static", "CUDA", prepared(quantize_static_on_gpu))


@torch.library.register_fake("intscale::quantize_static")
def _quantize_static_fake(x: Tensor, activation_scale: Tensor) -> tuple[Tensor, Tensor]:
    check_activation(x)
    check_activation_scale(x, activation_scale)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _no_gradient(ctx, grad_xq, grad_token_scale):
    """As of ``quantize_per_token``: the fused linear passes its gradient straight through."""
    return None, None


torch.library.register_autograd("intscale::quantize_static", _no_gradient)
