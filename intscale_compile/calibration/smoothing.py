"""Smoothing: scales of activation channels that make activations, or weights, easier to quantize, folded away exactly.

    X W^T = (X / s) (W s)^T

Four choices of ``s``, each per input channel:

- FPTQ (arXiv 2308.15987): ``s = max|X| / log2(2 + max|X|)``, from activations alone, with a policy for each layer.
- Outliers alone, with the same policy: ``s = max(1, max|X| / (2 median of max|X|))``.
- AWQ (arXiv 2306.00978): ``s = mean|X|^alpha / max|W|^(1 - alpha)``, alpha searched for the least output error.
- SmoothQuant (arXiv 2211.10438): ``s = max|X|^alpha / max|W|^(1 - alpha)`` with a given alpha.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor, nn

from ..config import IntScaleConfig
from ..tensors.intscale_tensor import IntScaleTensor
from .groups import Norm, ScalingGroup, fold_scale, scaling_groups
from .layers import Inputs, LinearWeight, observe_inputs, run_block, stages

STATIC_LIMIT = 15.0  # FPTQ's v0: below, static per tensor
EQUALIZE_LIMIT = 150.0  # FPTQ's v1: up to here, equalize, then static; above, per token
OUTLIER = 2.0  # times the median channel's largest magnitude: what is above is an outlier
SMALLEST = 1e-5  # of a channel's statistic: a channel that was never active keeps a usable scale
STATIC_TOKENS = 1024  # that the limit of a static scale is searched with
STATIC_FRACTIONS = tuple(2 ** (-i / 8) for i in range(25))  # of the largest magnitude, down to an eighth
AWQ_GRID = tuple(i / 10 for i in range(10))  # 20 values: the same perplexity on tiny-llama


@dataclass
class ChannelStatistics:
    """What is known of the input of a weight.

    Attributes:
        absmax: largest magnitude of each channel, fp32 ``[K]``.
        mean: mean magnitude of each channel, fp32 ``[K]``.
        tokens: how many tokens were seen.
        sample: the first of them, ``[T, K]``; for a stack of experts one tensor for each expert that saw any.
    """

    absmax: Tensor
    mean: Tensor
    tokens: int = 0
    sample: dict[Optional[int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ActivationPolicy:
    """How the input of a weight is quantized: per token, or with one static scale ``limit / 127``.

    Attributes:
        static: whether the scale is static.
        absmax: largest magnitude that was seen, after equalization.
        limit: the largest magnitude that a static scale represents.
        equalized: whether the input was divided by channel scales.
    """

    static: bool
    absmax: float
    limit: float
    equalized: bool = False


def collect_statistics(
    block: nn.Module, weights: Iterable[LinearWeight], batches: Sequence[Inputs], sample_tokens: int = 0
) -> dict[str, ChannelStatistics]:
    """Run a block on each of ``batches`` and gather channel statistics of the inputs of its weights.

    ``sample_tokens`` tokens are kept for each weight (for each expert of a stack), from the first batches on.
    """
    found: dict[str, ChannelStatistics] = {}

    def gather(name: str, expert: Optional[int], x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        size = rows.abs().float()
        known = found.setdefault(name, ChannelStatistics(size.new_zeros(size.shape[1]), size.new_zeros(size.shape[1])))
        known.absmax = torch.maximum(known.absmax, size.amax(0))
        known.mean += (size.mean(0) - known.mean) * (len(rows) / (known.tokens + len(rows)))
        known.tokens += len(rows)
        kept = known.sample.get(expert)
        room = sample_tokens - (0 if kept is None else len(kept))
        if room > 0:
            part = rows[:: max(1, len(rows) * len(batches) // sample_tokens)][:room].clone()
            known.sample[expert] = part if kept is None else torch.cat([kept, part])

    with torch.no_grad(), observe_inputs(block, weights, gather):
        for inputs in batches:
            run_block(block, inputs)
    return found


def logarithmic_scale(absmax: Tensor) -> Tensor:
    """FPTQ's logarithmic activation equalization: ``max|X| / log2(2 + max|X|)``, ``[K]``."""
    absmax = absmax.float().clamp(min=SMALLEST)
    return absmax / torch.log2(2 + absmax)


def outlier_scale(absmax: Tensor) -> Tensor:
    """``max(1, max|X| / (2 median))``, ``[K]``: outlier channels shrink to twice the median channel, all others stay.

    Weights of one group share a scale, so columns that are scaled apart from each other round worse. On tiny-llama with
    outliers the logarithmic scale, which moves every channel, raises the squared output error of the query and gate
    projections by 15 %, this one by 1 % (nearest rounding; 11 and 1 % with GPTQ).
    """
    return (absmax.float() / (OUTLIER * absmax.float().median().clamp(min=SMALLEST))).clamp(min=1)


EQUALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {"fptq": logarithmic_scale, "outliers": outlier_scale}


def smoothquant_scale(absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's ``max|X|^alpha / max|W|^(1 - alpha)``, ``[K]``; AWQ's with the mean magnitude as ``absmax``."""
    scale = absmax.float().clamp(min=SMALLEST) ** alpha / weight_absmax.float().clamp(min=SMALLEST) ** (1 - alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def weight_absmax(weights: Iterable[LinearWeight]) -> Tensor:
    """Largest magnitude of each column over several weights, ``[K]``; routers do not count."""
    columns = [w.weight.abs().flatten(0, -2).amax(0).float() for w in weights if not w.router]
    return torch.stack(columns).amax(0)


def merged(group: ScalingGroup, statistics: Mapping[str, ChannelStatistics]) -> ChannelStatistics:
    """Statistics of the activation of a group: those of the consumer that saw the most tokens (a router sees all)."""
    return max((statistics[w.name] for w in group.consumers if w.name in statistics), key=lambda known: known.tokens)


def equalize(
    groups: Sequence[ScalingGroup],
    weights: Iterable[LinearWeight],
    statistics: Mapping[str, ChannelStatistics],
    static_limit: float = STATIC_LIMIT,
    equalize_limit: float = EQUALIZE_LIMIT,
    scale_of: Callable[[Tensor], Tensor] = logarithmic_scale,
    published: bool = False,
) -> tuple[list[tuple[ScalingGroup, Tensor]], dict[str, ActivationPolicy]]:
    """FPTQ's policy for the weights of a block: which scales to fold, and how each activation is quantized then.

    With ``v`` the largest magnitude of the activation: below ``static_limit`` one static scale; up to ``equalize_limit``
    equalized, then one static scale; above, per token. Where nothing before can absorb the scale, ``v`` from
    ``static_limit`` on is per token too. Only norms absorb scales here, as in the paper. Other than in the paper, an
    activation above ``equalize_limit`` is equalized as well where that is free: int8 per token, too, loses the small
    channels beside such outliers. And a static scale does not reach to the largest magnitude, which one token may have
    alone, but to where the squared error of the sampled tokens is least (without samples: to the largest). With
    ``published`` both are as in the paper.

    Returns:
        Pairs for ``fold_scale``, and a policy for each weight that was seen, by name; routers have none.
    """
    absorbing = {w.name: group for group in groups if isinstance(group.previous, Norm) for w in group.consumers}
    folds: dict[int, tuple[ScalingGroup, Tensor]] = {}
    policies = {}
    for weight in weights:
        known = statistics.get(weight.name)
        if known is None or weight.router:
            continue
        group = absorbing.get(weight.name)
        known = known if group is None else merged(group, statistics)
        largest = float(known.absmax.max())
        scale = torch.ones_like(known.absmax)
        equalized = largest >= static_limit and group is not None and not (published and largest > equalize_limit)
        if group is not None and equalized:
            scale = scale_of(known.absmax)
            folds[id(group)] = (group, scale)
        static = largest < static_limit or (equalized and largest <= equalize_limit)
        absmax = float((known.absmax / scale).max())
        rows = [part.float() / scale for part in known.sample.values()] if static and not published else []
        limit = least_error_limit(torch.cat(rows), absmax) if rows else absmax
        policies[weight.name] = ActivationPolicy(static, absmax, limit, equalized)
    return list(folds.values()), policies


def least_error_limit(rows: Tensor, absmax: float) -> float:
    """Where int8 codes with one scale for all of ``rows`` ``[T, K]`` should saturate for the least squared error.

    ``absmax``, the largest magnitude that was seen anywhere, times one of :data:`STATIC_FRACTIONS`.
    """
    if not absmax:
        return absmax
    limits = [absmax * fraction for fraction in STATIC_FRACTIONS]
    errors = [(rounded_statically(rows, limit) - rows).square().sum() for limit in limits]
    return limits[int(torch.stack(errors).argmin())]


def rounded_statically(x: Tensor, limit: float) -> Tensor:
    """``x`` rounded to int8 with the scale ``limit / 127``."""
    step = limit / 127
    return (x / step).round().clamp(-127, 127) * step


def quantization_error(weight: LinearWeight, scale: Tensor, sample: Mapping[Optional[int], Tensor], config) -> float:
    """Squared error of a weight's output when input / ``scale`` and weight * ``scale`` are quantized.

    The weight goes through ``IntScaleTensor.from_hp``, the input through int8 per token.
    """
    total = 0.0
    for expert, x in sample.items():
        dense = (weight.weight if expert is None else weight.weight[expert]).float()
        x = x.float()
        rounded = IntScaleTensor.from_hp(dense * scale, config, name=weight.name).dequantize()
        total += float((fake_quantize(x / scale) @ rounded.mT - x @ dense.mT).square().sum())
    return total


def fake_quantize(x: Tensor) -> Tensor:
    """``x`` rounded to int8 with one scale per token."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / step).round() * step


def search_scale(
    group: ScalingGroup,
    statistics: Mapping[str, ChannelStatistics],
    config: Optional[IntScaleConfig] = None,
    grid: Sequence[float] = AWQ_GRID,
) -> tuple[Tensor, float, float]:
    """AWQ's search: the alpha whose scale gives the least squared error of the outputs of the group's consumers.

    Candidates are compared with group scales taken from the largest magnitudes (``scale_search="absmax"``): on tiny-llama
    the searched scales gave the same perplexity (10.66 and 10.65) and took three times as long.

    Args:
        group: from ``scaling_groups``.
        statistics: with samples, from ``collect_statistics``.
        config: how the weights will be quantized; None: the default.
        grid: values of alpha; no scale at all is tried as well.

    Returns:
        The scale ``[K]``, its alpha (-1: no scale), and its error relative to that of no scale.
    """
    config = dataclasses.replace(IntScaleConfig() if config is None else config, scale_search="absmax")
    known = merged(group, statistics)
    quantized = [w for w in group.consumers if not w.router and w.name in statistics]
    columns = weight_absmax(quantized)

    def error(scale: Tensor) -> float:
        return sum(quantization_error(w, scale, statistics[w.name].sample, config) for w in quantized)

    best, best_alpha = torch.ones_like(columns), -1.0
    plain = least = error(best)
    for alpha in grid:
        scale = group.tie(smoothquant_scale(known.mean, columns, alpha))
        if (found := error(scale)) < least:
            best, best_alpha, least = scale, alpha, found
    return best, best_alpha, least / plain if plain > 0 else 1.0


def smooth_fptq(
    block: nn.Module,
    batches: Sequence[Inputs],
    scale_of: Callable[[Tensor], Tensor] = logarithmic_scale,
    published: bool = False,
) -> dict[str, ActivationPolicy]:
    """Equalize a block as FPTQ does (see :func:`equalize`), in place; returns how each weight's input is to be quantized."""
    with torch.no_grad():
        groups = scaling_groups(block, batches[0])
        weights = [weight for stage in stages(block, batches[0]) for weight in stage]
        statistics = collect_statistics(block, weights, batches, STATIC_TOKENS)
        folds, policies = equalize(groups, weights, statistics, scale_of=scale_of, published=published)
        for group, scale in folds:
            fold_scale(group, scale)
    return policies


def smooth_awq(
    block: nn.Module, batches: Sequence[Inputs], config: Optional[IntScaleConfig] = None, sample_tokens: int = 256
) -> dict[str, float]:
    """Scale a block as AWQ does, group by group, in place; returns the remaining share of the error by group."""
    shares = {}
    with torch.no_grad():
        for group in scaling_groups(block, batches[0]):
            known = collect_statistics(block, group.consumers, batches, sample_tokens)
            scale, alpha, share = search_scale(group, known, config)
            if alpha >= 0:
                fold_scale(group, scale)
            shares[str(group)] = share
    return shares
