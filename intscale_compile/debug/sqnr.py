"""Signal to quantization noise, measured, and as rounding alone predicts it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import InputError
from ..kernels.hadamard import hadamard_transform
from ..tensors.intscale_tensor import IntScaleTensor

HALF_RANGE = {4: 7.5, 8: 127.0}  # steps from zero to the largest weight of a group


def float_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returns."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; inf without noise, -inf where either is NaN or infinite."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return -math.inf
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def sqnr(reference: Any, value: Any) -> float:
    """SQNR in dB of tensors, or of all floating-point tensors of two outputs together.

    Raises:
        InputError: their number or their shapes differ.
    """
    pairs = list(zip(float_tensors(reference), float_tensors(value), strict=False))
    if not pairs or len(float_tensors(reference)) != len(float_tensors(value)):
        raise InputError("the two outputs hold different numbers of tensors, or none: they cannot be compared.")
    signal = noise = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            raise InputError(f"outputs of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared.")
        a, b = a.detach().double(), b.detach().double().to(a.device)
        both = (a == b) | (a.isnan() & b.isnan())  # equal infinities (masks) are no noise
        signal += float(torch.where(both & ~a.isfinite(), 0.0, a).square().sum())
        noise += float(torch.where(both, 0.0, a - b).square().sum())
    return decibels(signal, noise)


def rescaled(a: Tensor, b: Tensor, gain: float = 2.0) -> Optional[Tensor]:
    """Factors of the last dimension with ``b ≈ a * factors``, where they explain ``gain`` dB of what ``b`` is; else None.

    Smoothing moves such factors from one layer into the next. Fewer than 4 rows would be explained by anything.
    """
    if a.shape != b.shape or a.dim() == 0 or a.numel() < 4 * a.shape[-1]:
        return None
    if not bool(a.isfinite().all() & b.isfinite().all()):
        return None
    flat_a, flat_b = a.double().reshape(-1, a.shape[-1]), b.double().reshape(-1, a.shape[-1])
    power = flat_a.square().sum(0)
    factors = torch.where(power > 0, (flat_a * flat_b).sum(0) / power.clamp(min=1e-300), 1.0)
    without, with_factors = sqnr(flat_b, flat_a), sqnr(flat_b, flat_a * factors)
    common = float(((factors - 1).abs() > 0.1).float().mean()) > 0.05  # a few wrong channels are a fault
    return factors if common and with_factors > max(without + gain, 8) else None


def as_stored(weight: Tensor, packed: IntScaleTensor, factors: Optional[Tensor] = None) -> Tensor:
    """A high-precision weight in the form that ``packed`` stores: ``[..., N, K]`` fp32, divided by ``factors``, rotated or
    its columns in the input order."""
    dense = weight.dequantize() if isinstance(weight, IntScaleTensor) else weight
    dense = (dense.mT if packed.transposed else dense).detach().float()
    dense = dense if factors is None else dense / factors.to(dense)
    return as_taken(dense, packed)


def as_taken(x: Tensor, packed: IntScaleTensor) -> Tensor:
    """Values whose last dimension is input features, in the form that the stored weight takes: rotated, or in its order."""
    if packed.input_order is not None:
        return x.index_select(-1, packed.input_order.view(-1).to(x.device))
    return hadamard_transform(x, packed.rotation) if packed.rotation else x


def dequantized(packed: IntScaleTensor) -> Tensor:
    """A weight as it is stored, ``[..., N, K]`` fp32: neither its rotation nor its input order undone."""
    return packed.replaced(transposed=False, rotation=0, input_order=None).dequantize().float()


def group_noise(weight: Tensor, packed: IntScaleTensor) -> Tensor:
    """Variance of the rounding error of each group ``[..., N, G]``: ``step**2 / 12``, the step from the group's absmax.

    The search for integer scales does better than that, coarse integer scales somewhat worse.
    """
    return (groups(weight, packed).abs().amax(-1) / HALF_RANGE[packed.weight_bits]).square() / 12


def groups(weight: Tensor, packed: IntScaleTensor) -> Tensor:
    """The last dimension in groups ``[..., G, group size]``, the last one padded with zeros."""
    columns = weight.shape[-1]
    size = packed.group_size if packed.group_size > 0 else columns
    return torch.nn.functional.pad(weight, (0, -columns % size)).unflatten(-1, (-1, size))


def predicted(weight: Tensor, packed: IntScaleTensor, x: Optional[Tensor], output: Tensor) -> float:
    """SQNR in dB that rounding the weight, and the activation to int8, predicts for a product.

    Args:
        weight: fp32, as stored.
        packed: its format; what it holds is not looked at.
        x: the activation ``[..., K]``, as the weight takes it; None: predict from the weight alone.
        output: the product in high precision.
    """
    noise = group_noise(weight, packed)
    if x is None:
        count = groups(torch.ones_like(weight), packed).sum(-1)
        return decibels(float(weight.double().square().sum()), float((noise * count).double().sum()))
    rows = x.detach().float().reshape(-1, x.shape[-1])
    power = groups(rows, packed).square().sum((0, -1))
    step = rows.abs().amax() if packed.act_pre_scale is not None else rows.abs().amax(-1)
    rounding = float(((step / 127).square() / 12).expand(rows.shape[0]).double().sum())
    total = float((noise.sum(-2) * power).double().sum()) + rounding * float(weight.double().square().sum())
    return decibels(float(output.detach().double().square().sum()), total)


def worst_group(weight: Tensor, packed: IntScaleTensor, x: Optional[Tensor]) -> tuple[float, tuple[int, ...]]:
    """By how many dB the error of a group of weights exceeds the predicted one at most, and the index of that group.

    Channels that are less active than the median count less, those that are never active not at all: GPTQ lets their
    weights go. More active ones count no more: a single clipped weight there would look like a wrong group.
    """
    importance = torch.ones(weight.shape[-1], device=weight.device)
    if x is not None:
        power = x.detach().float().reshape(-1, x.shape[-1]).square().sum(0).to(weight.device)
        importance = (power / power.median().clamp(min=1e-30)).clamp(max=1)
    error = (dequantized(packed) - weight).square() * importance
    expected = group_noise(weight, packed) * groups(importance, packed).sum(-1)
    expected = expected + 1e-3 * expected.mean(-1, keepdim=True) + 1e-30  # groups that hardly matter
    ratio = groups(error, packed).sum(-1) / expected
    ratio = torch.where(ratio.isfinite(), ratio, torch.inf)
    place = int(ratio.argmax())
    return decibels(float(ratio.flatten()[place]), 1.0), tuple(
        map(int, torch.unravel_index(torch.tensor(place), ratio.shape))
    )
