"""``intscale::hadamard`` and ``intscale::hadamard_quantize``: the online rotation of an activation (QuaRot, arXiv 2404.00456).

    h = x H / sqrt(size)       on each block of ``size`` features, H the Hadamard matrix of +-1 in Sylvester order

The transform is orthonormal, symmetric and its own inverse. A weight that was rotated likewise, ``W H / sqrt(size)``, meets
the rotated activation: the product is that of the originals, and outliers of the activation are spread over their block.

The arithmetic is fixed, so that every device gives the same bits: fp32; for ``stride = 1, 2, 4, ..., size / 2`` entries ``a``
and ``b`` at that distance become ``a + b`` and ``a - b``; then one product with fp32(1 / sqrt(size)); then one rounding to
the dtype of ``x``. ``hadamard_quantize`` quantizes what ``hadamard`` returns, in one launch on a GPU.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from ..errors import InputError
from .prepared import on_gpu
from .quantize_per_token import OP as QUANTIZE_OP
from .quantize_per_token import check_activation, quantize_per_token_aten
from .quantize_static import STATIC_OP, check_activation_scale, quantize_static_aten

# Entries that the reference transforms at a time: what stays in the cache of a core.
CHUNK = 1 << 18

torch.library.define("intscale::hadamard", "(Tensor x, int size) -> Tensor")
torch.library.define(
    "intscale::hadamard_quantize", "(Tensor x, int size, Tensor? activation_scale) -> (Tensor, Tensor)"
)
HADAMARD_OP = torch.ops.intscale.hadamard.default
HADAMARD_QUANTIZE_OP = torch.ops.intscale.hadamard_quantize.default


def check_hadamard(x: Tensor, size: int) -> None:
    """Raise ``InputError`` unless the blocks of ``size`` features of ``x`` can be transformed."""
    check_activation(x)
    if size < 2 or size & (size - 1):
        raise InputError(f"size={size}: a Hadamard transform takes a power of two from 2 on.")
    if x.shape[-1] % size:
        raise InputError(
            f"size={size} does not divide the {x.shape[-1]} features of the activation: "
            "use the largest power of two that does."
        )


def hadamard_transform(x: Tensor, size: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of every block of ``size`` entries of the last dimension.

    Args:
        x: fp32, bf16 or fp16 ``[..., K]``.
        size: a power of two that divides ``K``.

    Returns:
        ``[..., K]`` in the dtype of ``x``. It is linear: the gradient is the transform of the gradient.

    Raises:
        InputError: the size is no power of two, or does not divide ``K``.
    """
    return HADAMARD_OP(x, size)


def reference_hadamard(x: Tensor, size: int) -> Tensor:
    """The transform in plain PyTorch, any device; the oracle for the kernels, and what a CPU runs."""
    blocks = x.reshape(-1, size)
    out = torch.empty(blocks.shape, dtype=x.dtype, device=x.device)
    step = max(1, CHUNK // size)
    for first in range(0, blocks.shape[0], step):
        part = blocks[first : first + step]
        out[first : first + step] = _butterflies(part.to(torch.float32).t().contiguous(), size).t()
    return out.view(x.shape)


def _butterflies(x: Tensor, size: int) -> Tensor:
    """fp32 ``[size, blocks]``; blocks are columns so that all strides read adjacent memory."""
    stride, columns = 1, x.shape[1]
    while stride < size:
        a, b = x.view(size // (2 * stride), 2, stride * columns).unbind(1)
        x = torch.stack((a + b, a - b), dim=1)
        stride *= 2
    return x.view(size, columns) * (1.0 / math.sqrt(size))


@torch.library.impl("intscale::hadamard", "CompositeExplicitAutograd")
def _hadamard(x: Tensor, size: int) -> Tensor:
    check_hadamard(x, size)
    return reference_hadamard(x, size)


@on_gpu("intscale::hadamard")
def _hadamard_cuda(x: Tensor, size: int) -> Tensor:
    # Imports Triton, which only GPUs need.
    from .triton_hadamard import LONGEST_ROW, hadamard_cuda

    check_hadamard(x, size)
    return hadamard_cuda(x, size) if size <= LONGEST_ROW else reference_hadamard(x, size)


@torch.library.register_fake("intscale::hadamard")
def _hadamard_fake(x: Tensor, size: int) -> Tensor:
    check_hadamard(x, size)
    return x.new_empty(x.shape)


def _save_size(ctx, inputs, output):
    ctx.size = inputs[1]


def _transposed(ctx, grad):
    """The matrix is symmetric."""
    return HADAMARD_OP(grad, ctx.size), None


torch.library.register_autograd("intscale::hadamard", _transposed, setup_context=_save_size)


def _check_quantize(x: Tensor, size: int, activation_scale: Optional[Tensor]) -> None:
    check_hadamard(x, size)
    if activation_scale is not None:
        check_activation_scale(x, activation_scale)


@torch.library.impl("intscale::hadamard_quantize", "CompositeExplicitAutograd")
def _hadamard_quantize(x: Tensor, size: int, activation_scale: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    _check_quantize(x, size, activation_scale)
    rotated = reference_hadamard(x, size)
    return (
        quantize_per_token_aten(rotated)
        if activation_scale is None
        else quantize_static_aten(rotated, activation_scale)
    )


@on_gpu("intscale::hadamard_quantize")
def hadamard_quantize_on_gpu(x: Tensor, size: int, activation_scale: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """``intscale::hadamard_quantize`` on a GPU, without the dispatcher."""
    # Imports Triton, which only GPUs need.
    from .triton_hadamard import LONGEST_ROW, hadamard_quantize_cuda

    _check_quantize(x, size, activation_scale)
    if 0 < x.shape[-1] <= LONGEST_ROW:
        return hadamard_quantize_cuda(x, size, activation_scale)
    rotated = HADAMARD_OP(x, size)
    return QUANTIZE_OP(rotated) if activation_scale is None else STATIC_OP(rotated, activation_scale)


@torch.library.register_fake("intscale::hadamard_quantize")
def _hadamard_quantize_fake(x: Tensor, size: int, activation_scale: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    _check_quantize(x, size, activation_scale)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _no_gradient(ctx, grad_xq, grad_token_scale):
    """As of ``quantize_per_token``: the fused linear passes its gradient to ``hadamard`` of the activation."""
    return None, None, None


torch.library.register_autograd("intscale::hadamard_quantize", _no_gradient)
