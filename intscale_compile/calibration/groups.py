"""Where a scale of an activation's channels can be absorbed: ``scaling_groups`` finds out, ``fold_scale`` does it.

    X W^T = (X / s) (W s)^T

The division goes into what made X: the weight of a norm, or the rows of a weight. Whether that keeps the function is not
concluded from names; a copy of the block in fp32 is scaled and its output compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .layers import Inputs, LinearWeight, Stage, float_copy, run_block, trace, weights_of

log = logging.getLogger("intscale_compile")

SAME = 1e-5  # relative difference of outputs in fp32; scales are powers of two, so nothing but the order of sums may differ


@dataclass(frozen=True)
class Norm:
    """A normalisation with a weight per channel: ``normalised * (offset + weight) + bias``; Gemma's has offset 1."""

    name: str
    module: nn.Module
    offset: float = 0.0


@dataclass(frozen=True)
class ScalingGroup:
    """Weights that read one activation, and what made that activation and can absorb a scale of its channels.

    Attributes:
        previous: a norm, or a weight whose rows are scaled.
        consumers: every weight that reads the activation, routers included.
        rows: int64 ``[K]``, the row of ``previous`` that each channel comes from; None: the same number. Channels with
            the same row (grouped heads) must have the same scale: ``tie`` sees to it.
    """

    previous: Union[Norm, LinearWeight]
    consumers: tuple[LinearWeight, ...]
    rows: Optional[Tensor] = None

    @property
    def channels(self) -> int:
        """Number of channels of the activation, K."""
        return self.consumers[0].weight.shape[-1]

    def tie(self, scale: Tensor) -> Tensor:
        """``scale`` ``[..., K]`` with the largest value of each set of channels that share a row."""
        if self.rows is None:
            return scale
        rows = self.rows.to(scale.device).expand_as(scale)
        largest = scale.new_zeros(*scale.shape[:-1], int(rows.max()) + 1)
        return largest.scatter_reduce(-1, rows, scale, "amax").gather(-1, rows)

    def __str__(self) -> str:
        return f"{self.previous.name} -> {', '.join(weight.name for weight in self.consumers)}"


def scaling_groups(block: nn.Module, inputs: Inputs) -> list[ScalingGroup]:
    """Find where scales can be folded in a block; each group keeps the block's function, checked on ``inputs``.

    Args:
        block: a decoder or encoder layer.
        inputs: what it is called with, from ``record_inputs``; a few tokens suffice.

    Returns:
        At most one group for each stage of the block, in order of dataflow. A stage whose candidates all fail has none;
        the reason is logged.
    """
    with torch.no_grad():
        copied, wide = float_copy(block, inputs)
        before = run_block(copied, wide)
        found, modules = [], dict(block.named_modules())
        weights = weights_of(block)
        steps = trace(copied, wide)
        for place, stage in enumerate(steps):
            for group in _candidates(copied, stage, steps[max(0, place - 2) : place]):
                if _keeps_function(copied, wide, before, group):
                    found.append(_moved(group, modules, weights))
                    break
            else:
                names = ", ".join(weight.name for weight in stage.weights)
                log.info(
                    "no scale can be folded into what %s read: neither a norm nor a weight before absorbs it", names
                )
    return found


def fold_scale(group: ScalingGroup, scale: Tensor) -> None:
    """Divide the activation of ``group`` by ``scale`` and multiply the columns of its consumers, in place.

    Args:
        group: from ``scaling_groups``.
        scale: positive and finite, ``[K]``, or ``[E, K]`` between two stacks of experts; tied where rows are shared.

    Raises:
        CalibrationError: the scale has another shape, is not positive, or differs between channels that share a row.
    """
    _check_scale(group, scale)
    wide = scale.detach().double()
    for weight in group.consumers:
        columns = wide if wide.dim() == 1 else wide.unsqueeze(-2)
        weight.weight.copy_((weight.weight.double() * columns).to(weight.weight.dtype))
    previous = group.previous
    if isinstance(previous, Norm):
        stored = previous.module.weight.detach()  # type: ignore[union-attr, operator]
        stored.copy_(((stored.double() + previous.offset) / wide - previous.offset).to(stored.dtype))
        bias = getattr(previous.module, "bias", None)
        if isinstance(bias, Tensor):
            bias.detach().copy_((bias.double() / wide).to(bias.dtype))
        return
    rows = _row_scale(group, wide)
    stored, bias = previous.weight, previous.bias
    stored.copy_((stored.double() / rows.unsqueeze(-1)).to(stored.dtype))
    if bias is not None:
        bias.copy_((bias.double() / rows).to(bias.dtype))


def norm_offset(module: nn.Module, x: Tensor) -> Optional[float]:
    """0 for a norm that multiplies by its weight, 1 for one that multiplies by ``1 + weight``; None for anything else.

    Found by calling the module on ``x`` with weights of 0 and 1 and its bias at 0; both are put back.
    """
    own = [p for name in ("weight", "bias") if isinstance(p := getattr(module, name, None), Tensor)]
    kept = [p.detach().clone() for p in own]
    try:
        for parameter in own:
            parameter.detach().zero_()
        without = module(x)
        own[0].detach().fill_(1)
        unit = module(x) - without
        if torch.equal(without, torch.zeros_like(without)):
            return 0.0
        return 1.0 if difference(unit, without) < SAME else None
    finally:
        for parameter, value in zip(own, kept):
            parameter.detach().copy_(value)


def _check_scale(group: ScalingGroup, scale: Tensor) -> None:
    stacked = isinstance(group.previous, LinearWeight) and group.previous.weight.dim() == 3
    shapes = [(group.channels,)] + ([(len(group.consumers[0].weight), group.channels)] if stacked else [])
    if tuple(scale.shape) not in shapes:
        raise CalibrationError(f"the scale of {group} has shape {tuple(scale.shape)}: it must be one of {shapes}.")
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise CalibrationError(f"the scale of {group} has entries that are not positive and finite: clamp it first.")
    if not torch.equal(group.tie(scale), scale):
        raise CalibrationError(
            f"the scale of {group} differs between channels of one row: call group.tie(scale) first."
        )


def _row_scale(group: ScalingGroup, scale: Tensor) -> Tensor:
    """What each row of the previous weight is divided by, ``[..., N]``; rows that are not read here keep their scale."""
    assert isinstance(group.previous, LinearWeight)
    if group.rows is None:
        return scale
    rows = scale.new_ones(*scale.shape[:-1], group.previous.weight.shape[-2])
    return rows.scatter(-1, group.rows.to(scale.device).expand_as(scale), scale)


def _candidates(block: nn.Module, stage: Stage, before: Sequence[Stage]) -> Iterator[ScalingGroup]:
    consumers = tuple(stage.weights)
    channels = consumers[0].weight.shape[-1]
    if any(weight.weight.shape[-1] != channels for weight in consumers):
        return
    if stage.norm is not None:
        name, module, x = stage.norm
        offset = norm_offset(module, x)
        if offset is not None and module.weight.numel() == channels:  # type: ignore[union-attr, operator]
            yield ScalingGroup(Norm(name, module, offset), consumers)
        return
    heads = {
        size for m in block.modules() for n in ("head_dim", "head_size") if isinstance(size := getattr(m, n, None), int)
    }
    for earlier in reversed(before):
        for previous in reversed(earlier.weights):
            if not previous.router and previous.weight.dim() == consumers[0].weight.dim():
                for rows in _row_maps(previous.weight.shape[-2], channels, heads):
                    yield ScalingGroup(previous, consumers, rows)


def _row_maps(rows: int, channels: int, head_sizes: set[int]) -> Iterator[Optional[Tensor]]:
    """Which row of a weight makes which channel, as models lay it out: one to one, a part of joined weights, grouped heads."""
    if rows == channels:
        yield None
    elif rows > channels:  # q, k, v or gate, up in one weight: the last part or the first
        yield torch.arange(rows - channels, rows)
        yield torch.arange(channels)
    for size in head_sizes:
        if rows < channels and channels % rows == 0 and rows % size == 0:
            yield torch.arange(rows).view(-1, 1, size).expand(-1, channels // rows, -1).flatten()
        if rows == 3 * channels and channels % size == 0:  # q, k, v of each head side by side
            yield torch.arange(rows).view(-1, 3, size)[:, 2].flatten()
        groups = (rows - channels) // (2 * size)  # q of all heads, then k and v of fewer
        if rows > channels and groups and channels + 2 * groups * size == rows and channels % (groups * size) == 0:
            last = torch.arange(rows - groups * size, rows).view(groups, 1, size)
            yield last.expand(-1, channels // (groups * size), -1).flatten()


def _keeps_function(block: nn.Module, inputs: Inputs, before: Tensor, group: ScalingGroup) -> bool:
    """Whether the block's output stays the same when random powers of two are folded; the block is put back."""
    exponents = torch.randint(1, 4, (group.channels,), generator=torch.Generator().manual_seed(0))
    scale = group.tie((2.0**exponents).to(before.device))
    touched = [weight.weight for weight in group.consumers]
    if isinstance(group.previous, Norm):
        touched += [p.detach() for p in group.previous.module.parameters(recurse=False)]
    else:
        touched += [group.previous.weight] + ([group.previous.bias] if group.previous.bias is not None else [])
    kept = [tensor.clone() for tensor in touched]
    fold_scale(group, scale)
    after = run_block(block, inputs)
    for tensor, value in zip(touched, kept):
        tensor.copy_(value)
    return difference(after, before) < SAME


def difference(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference relative to the reference; NaN counts as infinitely far."""
    distance = float((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))
    return distance if distance == distance else float("inf")


def _moved(group: ScalingGroup, modules: dict[str, nn.Module], weights: dict[str, LinearWeight]) -> ScalingGroup:
    """The same group of the block that the copy was made from."""
    previous: Union[Norm, LinearWeight]
    if isinstance(group.previous, Norm):
        previous = Norm(group.previous.name, modules[group.previous.name], group.previous.offset)
    else:
        previous = weights[group.previous.name]
    return ScalingGroup(previous, tuple(weights[weight.name] for weight in group.consumers), group.rows)
