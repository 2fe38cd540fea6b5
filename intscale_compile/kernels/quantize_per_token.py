"""``intscale::quantize_per_token``: activations to int8, one symmetric scale per token.

The op exists so that graphs stay readable. Inductor decomposes it into the plain aten ops below and fuses them into
whatever produced the activation (a norm, SiLU * mul).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .prepared import prepared

# Rows below this magnitude become zeros; it keeps 127 / amax finite and costs an error below 1e-30.
SMALLEST_AMAX = 2.0**-100
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

torch.library.define("intscale::quantize_per_token", "(Tensor x) -> (Tensor, Tensor)")
OP = torch.ops.intscale.quantize_per_token.default


def check_activation(x: Tensor) -> None:
    """Raise ``InputError`` unless ``x`` is a floating point tensor with at least one dimension."""
    if x.dtype not in FLOAT_DTYPES:
        raise InputError(f"the activation is {x.dtype}; W4A8 needs float32, bfloat16 or float16: cast it first.")
    if x.dim() == 0:
        raise InputError("the activation is a scalar; it needs a feature dimension.")


def quantize_per_token_aten(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize every row of ``x`` to int8 with ``token_scale = max|x| / 127``.

    A row with NaN or Inf gets the scale NaN, so that its whole output is NaN; an all-zero row gives exact zeros.

    Args:
        x: fp32, bf16 or fp16 ``[..., K]``.

    Returns:
        int8 ``[..., K]`` in [-127, 127], and fp32 scales ``[..., 1]``.
    """
    wide = x.to(torch.float32)
    amax = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_AMAX)
    # A product, not amax / 127: Inductor would rewrite the quotient so, and the two differ in the last bit.
    token_scale = torch.where(amax < float("inf"), amax * (1.0 / 127.0), float("nan"))
    xq = (wide * (127.0 / amax)).round().clamp(-127.0, 127.0).to(torch.int8)
    return xq, token_scale


@torch.library.impl("intscale::quantize_per_token", "CompositeExplicitAutograd")
def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    check_activation(x)
    return quantize_per_token_aten(x)


def quantize_per_token_on_gpu(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_per_token_aten`, in one kernel."""
    # Imports Triton, which only GPUs need.
    from .triton_quantize import LONGEST_ROW, quantize_per_token_cuda

    check_activation(x)
    if 0 < x.shape[-1] <= LONGEST_ROW:
        return quantize_per_token_cuda(x, SMALLEST_AMAX)
    return quantize_per_token_aten(x)


# Not with on_gpu: no compiled graph calls it, so that nothing of it is to be compiled ahead.
torch.library.impl("intscale::quantize_per_token", "CUDA", prepared(quantize_per_token_on_gpu))


@torch.library.register_fake("intscale::quantize_per_token")
def _quantize_per_token_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check_activation(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _no_gradient(ctx, grad_xq, grad_token_scale):
    """Codes carry no gradient: the fused linear passes its own straight through (``ste_input``)."""
    return None


torch.library.register_autograd("intscale::quantize_per_token", _no_gradient)
