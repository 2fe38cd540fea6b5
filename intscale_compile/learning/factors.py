"""One factor per group inside of the rounding of a weight (QSLAW, arXiv 2408.03735); scales and zero points stay as they are.

    W_q = step * (clamp(round(W / (step * factor) + shift)) - shift),     step = row scale * group scale

A factor moves codes, and nothing else: whatever comes out, the integer group scales are those that calibration chose. Rounding
passes gradients straight through, so ``dW_q / dfactor = -W / factor^2`` where the code is not clamped.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import format as fmt
from ..calibration.solve import fake_quantize, frozen
from ..kernels.hadamard import hadamard_transform
from ..lora.requantize import own_grid, stored_form
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import show_quantized

SMALLEST_FACTOR = 0.1
INSIDE = 0.499  # of half a step: how far an original weight may lie from the code that it has


class LearnedLayer:
    """A linear layer with a quantized weight whose codes are learned.

    Attributes:
        name: of the layer in the model.
        factors: what is learned, fp32 ``[N, G]``, 1 at the start.
    """

    def __init__(self, name: str, module: nn.Module, original: Tensor):
        self.name, self.module = name, module
        self.tensor: IntScaleTensor = module.weight  # type: ignore[assignment]
        stored = self.tensor.transpose(-2, -1) if self.tensor.transposed else self.tensor
        self.plain: IntScaleTensor = stored.to_packing("plain")  # type: ignore[attr-defined]
        grid = own_grid(self.plain)
        self.low, self.high = grid.low, grid.high
        self.steps = self._wide(grid.steps)
        self.shift = None if grid.shift is None else self._wide(grid.shift / grid.steps)
        dense = original.detach().float()
        weight = stored_form(self.plain, dense.mT if self.tensor.transposed else dense)
        self.weight = self._within_cells(weight)
        self.factors = torch.ones_like(grid.steps, requires_grad=True)

    def _wide(self, part: Tensor) -> Tensor:
        """``[N, G]`` as ``[N, K]``."""
        columns = self.plain.in_features
        size = columns if self.plain.group_size == -1 else self.plain.group_size
        return part.repeat_interleave(size, dim=-1)[:, :columns]

    def _within_cells(self, weight: Tensor) -> Tensor:
        """The weight, moved where it does not round to the code that it has: GPTQ rounds elsewhere on purpose."""
        codes, shift = self.plain.codes.float(), 0.0 if self.shift is None else self.shift
        below = torch.where(codes <= self.low, -torch.inf, codes - INSIDE)
        above = torch.where(codes >= self.high, torch.inf, codes + INSIDE)
        return ((weight / self.steps + shift).clamp(below, above) - shift) * self.steps

    def _scaled(self, factors: Tensor) -> Tensor:
        scaled = self.weight / (self.steps * self._wide(factors.clamp(min=SMALLEST_FACTOR)))
        return scaled if self.shift is None else scaled + self.shift

    def codes(self, factors: Tensor) -> Tensor:
        """Codes, fp32 ``[N, K]``."""
        return self._scaled(factors).round_().clamp_(self.low, self.high)

    def dense(self, factors: Tensor) -> Tensor:
        """``W_q``, fp32 ``[N, K]``, over the stored columns."""
        codes = self.codes(factors)
        return (codes if self.shift is None else codes.sub_(self.shift)).mul_(self.steps)

    def slope(self, gradient: Tensor, factors: Tensor) -> Tensor:
        """The gradient of the factors ``[N, G]`` for one of the dense weight ``[N, K]``."""
        scaled = self._scaled(factors)
        inside = (scaled > self.low - 0.5) & (scaled < self.high + 0.5)
        products = torch.where(inside, gradient * self.weight, 0.0)
        groups = factors.shape[-1]
        width = self.plain.in_features if groups == 1 else self.plain.group_size
        products = F.pad(products, (0, groups * width - products.shape[-1]))
        return -products.unflatten(-1, (groups, width)).sum(-1) / factors.clamp(min=SMALLEST_FACTOR).square()

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes while its codes are learned, activations quantized as they will be."""
        if self.plain.input_order is not None:
            x = x.index_select(-1, self.plain.input_order.view(-1))
        if self.plain.rotation:
            x = hadamard_transform(x, self.plain.rotation)
        y = _Product.apply(x, self.factors, self)
        return y if self.module.bias is None else y + self.module.bias

    def finish(self, factors: Optional[Tensor]) -> int:
        """Give the layer the codes of ``factors``, and its own ``forward`` back; how many codes changed.

        A row whose accumulator could overflow with its new codes keeps the old ones.
        """
        if "forward" in vars(self.module):
            del self.module.forward
        if factors is None:
            return 0
        old = self.plain.codes
        codes = self.codes(factors).to(torch.int8)
        changed = self._with(codes)
        unsafe = changed.accumulator_bound() > fmt.INT32_MAX
        if bool(unsafe.any()):
            codes = torch.where(unsafe.unsqueeze(-1), old, codes)
            changed = self._with(codes)
        count = int((codes != old).sum())
        if count:
            changed = changed.to_packing(self.tensor.packing_format)
            self.module.weight = frozen(changed.transpose(-2, -1) if self.tensor.transposed else changed)
            show_quantized(self.module)
        return count

    def _with(self, codes: Tensor) -> IntScaleTensor:
        padded = fmt.pad_codes(codes, self.plain.in_features, self.plain.group_size)
        packed = padded if self.plain.weight_bits == 8 else fmt.pack_int4(padded, self.plain.group_size)
        return self.plain.replaced(qdata=fmt.contiguous(packed))


class _Product(torch.autograd.Function):
    """The product with a learned weight. The dense weight is made anew in the backward pass: none is kept between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, layer: LearnedLayer) -> Tensor:  # type: ignore[override]
        static = layer.plain.act_pre_scale
        rounded = fake_quantize(x, None if static is None else float(static))
        ctx.save_for_backward(rounded, factors)
        ctx.layer = layer
        return F.linear(rounded, layer.dense(factors).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        rounded, factors = ctx.saved_tensors
        grad_x = grad @ ctx.layer.dense(factors).to(grad.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = (rows.mT @ rounded.reshape(-1, rounded.shape[-1])).float()
        return grad_x, ctx.layer.slope(grad_weight, factors), None
