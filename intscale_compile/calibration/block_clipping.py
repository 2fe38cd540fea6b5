"""Learned weight clipping with the block's output as the goal: OmniQuant's way (arXiv 2308.13137), which OdysseyLLM
(arXiv 2311.09550) takes over in its symmetric form.

    step = max(sigmoid(gamma) max W, -sigmoid(beta) min W) / 7,     loss = |block(x, W') - target|^2

``learn_steps`` of ``clipping.py`` learns the same factors from each layer's own output, with a gradient in closed form; here
all weights of a block are rounded at once and gradients come from running it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..config import IntScaleConfig
from ..tensors.scale_search import SMALLEST_STEP
from .clipping import ODYSSEY_STEP, code_range, into_groups
from .layers import LinearWeight

LEARNING_STEPS = 128  # batches; OmniQuant takes 20 passes over its data with a rate of 0.01
LEARNING_RATE = 5e-2  # falls to 0
START = 4.0  # sigmoid: 0.982 of the range


def rounded_within(scaled: Tensor, low: int, high: int) -> Tensor:
    """``clamp(round(scaled), low, high)``; the gradient passes straight through every code from ``low`` to ``high``.

    The gradient of ``Tensor.clamp`` at its ends is 1 up to torch 2.13 and 0 from 2.14 on.
    """
    rounded = scaled.detach().round()
    codes = scaled + (rounded - scaled).detach()
    return torch.where((rounded >= low) & (rounded <= high), codes, rounded.clamp(low, high))


class _Clipped:
    """A weight rounded with factors of the range of each group, as a function of the factors' logits ``[2, ..., N, G]``."""

    def __init__(self, weight: LinearWeight, config: IntScaleConfig):
        dense = weight.weight.float()
        size = config.effective_group_size
        self.columns, self.dtype, self.transposed = dense.shape[-1], weight.weight.dtype, weight.transposed
        self.groups = into_groups(F.pad(dense, (0, 0 if size == -1 else -self.columns % size)), config)
        ends = torch.stack([self.groups.amax(-1), -self.groups.amin(-1)])
        self.ranges = ends.clamp(min=SMALLEST_STEP) / ODYSSEY_STEP
        self.logits = torch.full_like(self.ranges, START, requires_grad=True)
        self.low, self.high = code_range(config)

    def steps(self) -> Tensor:
        """fp32 ``[..., N, G]``."""
        return (self.ranges * torch.sigmoid(self.logits)).amax(0)

    def weight(self) -> Tensor:
        """The rounded weight as the module keeps it; rounding passes gradients straight through."""
        steps = self.steps().unsqueeze(-1)
        scaled = self.groups / steps
        codes = rounded_within(scaled, self.low, self.high)
        dense = (codes * steps).flatten(-2)[..., : self.columns].to(self.dtype)
        return dense.mT if self.transposed else dense


def learn_block_steps(
    block: nn.Module,
    weights: Mapping[LinearWeight, IntScaleConfig],
    runs: Sequence[Callable],
    target: Sequence[Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """Steps of the weights of a block with which its output on ``runs`` comes closest to ``target``.

    The block's own weights stay as they are; activations are not rounded meanwhile.

    Args:
        block: not quantized, or in part.
        weights: those to learn for, with their formats; 8-bit ones are left out.
        runs: callables that give the block's inputs, batch by batch.
        target: what the original block returned for each batch.
        seed: of the order of the batches.

    Returns:
        fp32 ``[..., N, G]`` by the name of the weight.
    """
    parts = {w: _Clipped(w, config) for w, config in weights.items() if config.weight_bits == 4}
    if not parts:
        return {}
    optimizer = torch.optim.Adam([part.logits for part in parts.values()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, LEARNING_STEPS)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    with torch.enable_grad():
        for _ in range(LEARNING_STEPS):
            order = order or torch.randperm(len(runs), generator=generator).tolist()
            batch = order.pop()
            args, kwargs = runs[batch]()
            result = functional_call(block, {w.qualified: part.weight() for w, part in parts.items()}, args, kwargs)
            while not isinstance(result, Tensor):
                result = result[0]
            optimizer.zero_grad()
            wanted = target[batch].to(result.device).float()
            ((result.float() - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)).backward()
            optimizer.step()
            schedule.step()
    return {w.name: part.steps().detach() for w, part in parts.items()}
