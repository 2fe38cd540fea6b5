"""Tuning a quantized block against the original one: row scales, norm weights and biases, codes as they are.

Row scales and the vectors of a block (norm weights, biases) stay floats in the quantized model, so they can be moved freely.
Gradient descent makes the block's output on its own, quantized inputs match the output of the original block on the
original inputs, so that it makes up for what the blocks before it lost as well (the block-wise objective of ApiQ, arXiv
2402.05147). The error of each token counts relative to the token's size: that is what the next norm passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..tensors.intscale_tensor import IntScaleTensor
from .config import CalibrationConfig
from .layers import run_block
from .solve import FloatScaleWeight, frozen

LEARNING_RATE = 2e-3  # of logarithms of row scales, and of vectors relative to their mean magnitude


def tune_block(
    block: nn.Module, runs: list[Callable], target: list[Tensor], options: CalibrationConfig
) -> tuple[float, float]:
    """Tune a block in place; it is left as it was where that does not lower the error.

    Args:
        block: quantized.
        runs: callables that give the block's inputs, batch by batch.
        target: what the original block returned for each batch.
        options: ``tuning_steps`` and ``seed``.

    Returns:
        Mean relative squared error of a token before and after.
    """
    parts = _Parts(block)
    before = _mean_error(block, runs, target)
    with torch.enable_grad():
        _descend(block, parts, runs, target, options)
    kept = parts.apply(block)
    after = _mean_error(block, runs, target)
    if not after < before:
        for name, value in kept.items():
            _set(block, name, value)
        after = before
    return before, after


class _Parts:
    """What is tuned: factors of the rows of each quantized weight, and shifts of each vector, all starting at 0."""

    def __init__(self, block: nn.Module):
        self.dense: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        self.sizes: dict[str, Tensor] = {}
        self.free: dict[str, Tensor] = {}
        for name, value in block.named_parameters():
            if isinstance(value, (IntScaleTensor, FloatScaleWeight)):
                dense = value.dequantize() if isinstance(value, IntScaleTensor) else value.as_subclass(Tensor)
                self.dense[name] = dense.detach().float()
                shape = list(value.shape)
                shape[-2 if _kept_transposed(value) else -1] = 1
                self.free[name] = torch.zeros(shape, device=value.device)
            elif value.dim() == 1:
                self.vectors[name] = value.detach().float()
                self.sizes[name] = value.detach().float().abs().mean().clamp(min=1e-3)
                self.free[name] = torch.zeros_like(self.vectors[name])
        for free in self.free.values():
            free.requires_grad_(True)

    def parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters of the block as functions of what is tuned."""
        weights = {name: (dense * self.free[name].exp()).to(dtype) for name, dense in self.dense.items()}
        vectors = {name: self._vector(name).to(dtype) for name in self.vectors}
        return weights | vectors

    def _vector(self, name: str) -> Tensor:
        return self.vectors[name] + self.sizes[name] * self.free[name]

    def apply(self, block: nn.Module) -> dict[str, Any]:
        """Write the tuned values into the block; returns what was there."""
        kept: dict[str, Any] = {}
        for name in self.free:
            old: Tensor = block.get_parameter(name)
            kept[name] = old
            change = self.free[name].detach()
            if isinstance(old, IntScaleTensor):
                rows = change.exp().mT if _kept_transposed(old) else change.exp()
                new: Tensor = old.replaced(per_tensor_scale=old.per_tensor_scale * rows)
            elif isinstance(old, FloatScaleWeight):
                new = old.with_row_factors(change.exp())
            else:
                new = self._vector(name).detach().to(old.dtype)
            _set(block, name, frozen(new))
        return kept


def _kept_transposed(value: Any) -> bool:
    return value.transposed if isinstance(value, IntScaleTensor) else value.kept_transposed


def _set(block: nn.Module, name: str, value: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(owner), leaf, value)


def _descend(
    block: nn.Module, parts: _Parts, runs: list[Callable], target: list[Tensor], options: CalibrationConfig
) -> None:
    optimizer = torch.optim.Adam(parts.free.values(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(options.seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.tuning_steps)
    order: list[int] = []
    for _ in range(options.tuning_steps):
        order = order or torch.randperm(len(runs), generator=generator).tolist()
        batch = order.pop()
        args, kwargs = runs[batch]()
        result = functional_call(block, parts.parameters(target[batch].dtype), args, kwargs)
        optimizer.zero_grad()
        token_error(result if isinstance(result, Tensor) else result[0], target[batch]).backward()
        optimizer.step()
        schedule.step()


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error ``[..., D]`` relative to the size of the token's target."""
    target = target.to(output.device).float()
    return ((output.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)).mean()


def _mean_error(block: nn.Module, runs: list[Callable], target: list[Tensor]) -> float:
    return sum(float(token_error(run_block(block, inputs()), t)) for inputs, t in zip(runs, target)) / len(runs)
