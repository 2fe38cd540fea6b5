"""Choosing the steps of a weight: the grid that its codes are rounded to.

A step is a row scale times a group scale. On the integer grid (``amplifier="row"``, at most 4 bits) the group scales are
integers found by the exhaustive search of ``scale_search``; every other format starts from float steps, whose conversion
to integers leaves the codes as they are.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from ..config import IntScaleConfig
from ..tensors.scale_search import (
    INT8_STEP,
    MAX_EXHAUSTIVE_BITS,
    PLAIN_STEP,
    ROW_FRACTIONS,
    SMALLEST_STEP,
    chunk_elements,
    search_float_steps,
    search_integer_scales,
)

LEARNED_STEPS = 100
LEARNING_RATE = 0.05
ODYSSEY_STEP = 7.0  # 2**(4 - 1) - 1
LARGEST_SIGMOID = 0.99


def code_range(config: IntScaleConfig) -> tuple[int, int]:
    """Smallest and largest code."""
    return (-127, 127) if config.weight_bits == 8 else (-8, 7)


def on_integer_grid(config: IntScaleConfig) -> bool:
    """Whether codes are rounded to steps that integer group scales make, so that no conversion follows."""
    per_channel = config.effective_group_size == -1 and config.amplifier == "row"
    return per_channel or (config.amplifier == "row" and config.scale_bits <= MAX_EXHAUSTIVE_BITS)


def choose_steps(weight: Tensor, config: IntScaleConfig, importance: Optional[Tensor], *, integer: bool) -> Tensor:
    """Search the steps of a weight.

    Args:
        weight: fp32 ``[N, Kp]``, whole groups.
        config: format; ``scale_search="absmax"`` takes plain float steps.
        importance: what the squared error of each column counts, fp32 ``[Kp]``; None: 1.
        integer: whether group scales are integers.

    Returns:
        fp32 ``[N, G]``.
    """
    rows = max(1, chunk_elements(weight, config) // weight.shape[-1])
    return torch.cat([_steps_of_rows(chunk, config, importance, integer) for chunk in weight.split(rows)])


def _steps_of_rows(weight: Tensor, config: IntScaleConfig, importance: Optional[Tensor], integer: bool) -> Tensor:
    absmax = weight.abs().amax(-1, keepdim=True)
    absmax = torch.where(absmax > 0, absmax.clamp(min=SMALLEST_STEP), torch.ones_like(absmax))
    groups = into_groups(weight / absmax, config)
    counts = None if importance is None else into_groups(importance.unsqueeze(0), config).squeeze(0)
    if integer and config.effective_group_size != -1:
        steps, scales = search_integer_scales(groups, (1 << config.scale_bits) - 1, counts)
        return (steps * scales * absmax).clamp(min=SMALLEST_STEP)
    plain = groups.abs().amax(-1) / (INT8_STEP if config.weight_bits == 8 else PLAIN_STEP)
    if config.scale_search == "mse":
        plain = search_float_steps(groups, plain, *code_range(config), counts)
    return torch.where(plain > 0, plain * absmax, torch.ones_like(plain)).clamp(min=SMALLEST_STEP)


def into_groups(weight: Tensor, config: IntScaleConfig) -> Tensor:
    """``[N, Kp]`` as ``[N, G, g]``."""
    size = config.effective_group_size
    return weight.unsqueeze(-2) if size == -1 else weight.unflatten(-1, (-1, size))


def learn_steps(weight: Tensor, steps: Tensor, hessian: Tensor, config: IntScaleConfig) -> Tensor:
    """Learned weight clipping: factors of the range of every group, by gradient descent on the layer's output error.

        step = max(sigmoid(gamma) max W, -sigmoid(beta) min W) / 7,     loss = tr((W - W') H (W - W')^T)

    The symmetric form of OdysseyLLM (arXiv 2311.09550) of OmniQuant's LWC (arXiv 2308.13137): rounding passes gradients
    straight through. Adam; each row keeps its best step of all iterations, the searched one included.

    Args:
        weight: fp32 ``[N, Kp]``.
        steps: fp32 ``[N, G]``, where to begin.
        hessian: fp32 ``[Kp, Kp]``.
        config: format; 4-bit weights.

    Returns:
        fp32 ``[N, G]``.
    """
    groups = into_groups(weight, config)
    ranges = torch.stack([groups.amax(-1), -groups.amin(-1)]).clamp(min=SMALLEST_STEP) / ODYSSEY_STEP
    start = (steps / ranges.amax(0)).clamp(1e-3, LARGEST_SIGMOID)
    logits = torch.logit(start).expand_as(ranges).contiguous()
    state = torch.zeros_like(logits), torch.zeros_like(logits)
    best, least = steps, torch.full_like(weight[:, :1], math.inf)
    candidate = steps
    for iteration in range(LEARNED_STEPS + 1):
        error, slope = _output_error_slope(groups, candidate, hessian, config)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, candidate, best)
        sigmoid = torch.sigmoid(logits)
        sides = ranges * sigmoid
        chosen = torch.stack([sides[0] >= sides[1], sides[1] > sides[0]])
        gradient = torch.where(chosen, slope * ranges * sigmoid * (1 - sigmoid), 0.0)
        logits = _adam(logits, gradient, state, iteration + 1)
        candidate = (ranges * torch.sigmoid(logits)).amax(0)
    return best


def _output_error_slope(
    groups: Tensor, steps: Tensor, hessian: Tensor, config: IntScaleConfig
) -> tuple[Tensor, Tensor]:
    """Output error of each row ``[N, 1]`` for steps ``[N, G]``, and its derivative by the steps."""
    scaled = groups / steps.unsqueeze(-1)
    low, high = code_range(config)
    codes = scaled.round().clamp_(low, high)
    error = groups - codes * steps.unsqueeze(-1)
    pull = (error.flatten(-2) @ hessian).view_as(groups)
    inside = (scaled > low - 0.5) & (scaled < high + 0.5)
    slope = -2 * (pull * (codes - torch.where(inside, scaled, 0.0))).sum(-1)
    return (pull * error).sum((-2, -1)).unsqueeze(-1), slope


def _adam(value: Tensor, gradient: Tensor, state: tuple[Tensor, Tensor], iteration: int) -> Tensor:
    mean, square = state
    mean.lerp_(gradient, 0.1)
    square.lerp_(gradient.square(), 0.01)
    corrected = mean / (1 - 0.9**iteration)
    size = (square / (1 - 0.99**iteration)).sqrt()
    return value - LEARNING_RATE * corrected / size.clamp(min=1e-30)


def nearest_integer_steps(weight: Tensor, steps: Tensor, config: IntScaleConfig, importance: Tensor) -> Tensor:
    """Steps on the integer grid for float steps: the row scale whose integers round the weight best.

    Args:
        weight: fp32 ``[N, Kp]``.
        steps: fp32 ``[N, G]``.
        config: format on the integer grid.
        importance: fp32 ``[Kp]``, what the squared error of each column counts.

    Returns:
        fp32 ``[N, G]``, each row an fp32 number times integers.
    """
    if config.effective_group_size == -1:
        return steps
    groups, counts = into_groups(weight, config), into_groups(importance.unsqueeze(0), config)
    largest, scale_max = steps.amax(-1, keepdim=True), (1 << config.scale_bits) - 1
    best, least = steps, torch.full_like(largest, math.inf)
    for fraction in ROW_FRACTIONS:
        row = largest * fraction / scale_max
        candidate = (steps / row).round().clamp(1, scale_max) * row
        wide = candidate.unsqueeze(-1)
        rest = groups - (groups / wide).round_().clamp_(*code_range(config)).mul_(wide)
        error = (rest.square_() * counts).sum((-2, -1)).unsqueeze(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, candidate, best)
    return best
