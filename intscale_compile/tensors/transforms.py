"""Products with quantized weights under ``torch.func``: ``grad``, ``vjp``, ``jvp``, ``jacrev`` and ``vmap`` of them.

``torch.library``'s gradients are not defined under these transforms. So a product there is one function of
``torch.autograd``, whose derivative is that of the straight-through estimator: the product with the dequantized weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from .intscale_tensor import IntScaleTensor

Run = Callable[[Tensor, IntScaleTensor, Optional[Tensor]], Tensor]


class _Product:
    """A quantized product and its weight; no tensor to the transforms, which would look into it."""

    def __init__(self, run: Run, weight: IntScaleTensor):
        self.run, self.weight = run, weight


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Optional[Tensor], product: _Product) -> Tensor:  # type: ignore[override]
        return product.run(x, product.weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, bias, ctx.product = inputs
        ctx.input_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.output_dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        grad_bias = None
        if ctx.bias_dtype is not None:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return (grad @ ctx.product.weight.dequantize(grad.dtype)).to(ctx.input_dtype), grad_bias, None

    @staticmethod
    def jvp(ctx: Any, x: Optional[Tensor], bias: Optional[Tensor], product: Any) -> Tensor:  # type: ignore[override]
        change = torch.zeros((), dtype=ctx.output_dtype)
        if x is not None:
            change = x.to(ctx.output_dtype) @ ctx.product.weight.dequantize(ctx.output_dtype).t()
        return change if bias is None else change + bias.to(ctx.output_dtype)


def transformed(run: Run, x: Tensor, weight: IntScaleTensor, bias: Optional[Tensor]) -> Tensor:
    """``run(x, weight, bias)``, a product ``x @ weight.T + bias``, with a derivative that torch.func's transforms can use.

    Args:
        run: the product; called again below the transform.
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]``.
    """
    return _StraightThrough.apply(x, bias, _Product(run, weight))
