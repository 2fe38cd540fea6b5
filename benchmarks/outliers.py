"""Outlier channels put into a model that has none, without changing its function: what large models have by nature."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from intscale_compile.calibration.groups import Norm, fold_scale, scaling_groups
from intscale_compile.calibration.layers import blocks, example_batch, record_inputs


def inject_outliers(
    model: nn.Module,
    fraction: float = 0.01,
    low: float = 8.0,
    high: float = 64.0,
    seed: int = 0,
    batch: Optional[Any] = None,
) -> dict[str, Tensor]:
    """Multiply a few channels of every norm by a large factor and divide the columns of the weights that read it.

    The function of the model stays the same, in place; its activations become as hard to quantize as those of large
    models, whose outliers sit in fixed channels (arXiv 2208.07339).

    Args:
        model: a transformers model with norms before its linear layers, in floating point.
        fraction: share of the channels, at least one.
        low, high: range of the factors, drawn uniformly.
        seed: of channels and factors.
        batch: token ids or keyword arguments to find the structure with; None: a few ids.

    Returns:
        The factors by the name of the norm, fp32 ``[K]``, 1 where nothing changed.
    """
    generator = torch.Generator().manual_seed(seed)
    recorded = record_inputs(model, example_batch(model) if batch is None else batch)
    factors: dict[str, Tensor] = {}
    for name, block in blocks(model):
        for group in scaling_groups(block, recorded[name]):
            if isinstance(group.previous, Norm):
                count = max(1, round(fraction * group.channels))
                chosen = torch.randperm(group.channels, generator=generator)[:count]
                factor = torch.ones(group.channels)
                factor[chosen] = low + (high - low) * torch.rand(count, generator=generator)
                fold_scale(group, (1 / factor).to(group.consumers[0].weight.device))
                factors[f"{name}.{group.previous.name}"] = factor
    return factors
