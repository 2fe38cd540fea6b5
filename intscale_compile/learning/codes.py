"""``learn_codes``: the codes of a quantized model learned on a task, its scales as they are (QSLAW, arXiv 2408.03735)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..calibration.config import CalibrationConfig
from ..calibration.layers import stacks
from ..calibration.pipeline import CONFIG_ATTRIBUTE
from ..calibration.rotation import rotate
from ..errors import CalibrationError, ConfigError
from ..kernels.hadamard import hadamard_transform
from ..lora.blocks import load_original
from ..progress import block_bar
from ..tensors.input_rotation import ROTATION
from ..tensors.intscale_tensor import IntScaleTensor
from .factors import LearnedLayer

ANOTHER_WEIGHT = 0.5  # relative difference from which on an original weight is not that of the quantized one
LOOKS = 10  # how often the held-out loss is looked at
HELD_OUT = 8  # every eighth batch, and as many at most

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Mixed:
    """Batches of two kinds. The share of the first falls linearly after the warm-up, which is QSLAW's progressive mix.

    Attributes:
        multimodal, language: batches of either kind.
        start, end: share of the multimodal ones at the beginning and in the end, 0 to 1.
    """

    multimodal: Sequence[Any]
    language: Sequence[Any]
    start: float = 1.0
    end: float = 0.5


@dataclass
class LearningReport:
    """What ``learn_codes`` did.

    Attributes:
        losses: held-out loss by step, that of the model as it was at step 0.
        kept: the step whose codes were kept; 0: the model is as it was.
        changed: how many codes of each layer changed.
        weights: how many codes the learned layers have.
        skipped: quantized weights that were left alone, with the reason.
    """

    losses: dict[int, float] = field(default_factory=dict)
    kept: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        share = sum(self.changed.values()) / max(1, self.weights)
        rows = [
            f"  step {step}: {loss:.4f}{' (kept)' if step == self.kept else ''}" for step, loss in self.losses.items()
        ]
        return "\n".join([f"{share:.2%} of {self.weights} codes changed; held-out loss:", *rows])


def learn_codes(
    model: nn.Module,
    original: Union[nn.Module, str, Path],
    batches: Union[Iterable[Any], Mixed],
    *,
    loss: Optional[Loss] = None,
    steps: int = 500,
    lr: float = 2e-3,
    warmup: float = 0.03,
    first_layer: int = 0,
    also: Sequence[str] = (),
    also_lr: Optional[float] = None,
    seed: int = 0,
    progress: bool = True,
) -> LearningReport:
    """Learn one factor per group inside of the rounding of every weight, on a task's loss, in place.

    Only codes change: row scales, group scales, zero points, rotation and static activation scales stay to the bit. The codes of
    the step with the least loss on held-out batches (every eighth) are kept; where none is better, the model is as it was.

    Args:
        model: quantized by any recipe without smoothing, in eval mode.
        original: the model before it was quantized, or its folder.
        batches: keyword arguments of the model, with labels, so that it returns a loss; or whatever ``loss`` takes; or
            ``Mixed`` batches of two kinds.
        loss: takes the model and a batch; None: the model's own.
        steps: how many; batches are used again, in another order.
        lr: learning rate of the factors after the warm-up; it falls to 0 along a cosine.
        warmup: share of the steps in which the learning rate rises, and in which ``Mixed`` does not change.
        first_layer: layers before this one keep their codes (the paper: 6).
        also: names of plain parameters that are learned too, or of modules of them, such as ``"multi_modal_projector"``.
        also_lr: their learning rate; None: a hundredth of ``lr``.
        seed: of the order of the batches.
        progress: show a bar.

    Raises:
        ConfigError: an argument that is not supported, ``original`` of other shapes or another model, nothing to learn.
        CalibrationError: no batches, no loss, or one that is not finite; the model is as it was then.
    """
    _check(steps, lr, warmup, first_layer, seed, also_lr)
    if model.training:
        raise ConfigError("the model is in training mode, where dropout may be active: call model.eval() first.")
    report = LearningReport()
    layers = _layers(model, load_original(original), first_layer, report)
    extra = _plain_parameters(model, also)
    train, held_out = _divided(batches, seed)
    order = _order(train, steps, warmup, seed)
    rates = lr, lr / 100 if also_lr is None else also_lr
    with _learning(model, layers, extra, report) as best:
        best += _descend(model, layers, extra, order, held_out, loss or _own_loss, report, rates, warmup, progress)
    return report


@contextlib.contextmanager
def _learning(
    model: nn.Module, layers: list[LearnedLayer], extra: list[Tensor], report: LearningReport
) -> Iterator[list[Tensor]]:
    """Layers compute with the codes of their factors; afterwards they and ``extra`` have what the caller puts into the list that
    is yielded, or what they had."""
    before = [p.detach().clone() for p in extra]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    best: list[Tensor] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for value in extra:
            value.requires_grad_(True)
        for layer in layers:
            layer.module.forward = layer.forward  # type: ignore[method-assign]
        yield best
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        with torch.no_grad():
            for value, wanted in zip(extra, best[len(layers) :] if best else before):
                value.copy_(wanted)
        for place, layer in enumerate(layers):
            report.changed[layer.name] = layer.finish(best[place] if best else None)


def _descend(
    model: nn.Module,
    layers: list[LearnedLayer],
    extra: list[Tensor],
    order: list[Any],
    held_out: list[Any],
    measure: Loss,
    report: LearningReport,
    rates: tuple[float, float],
    warmup: float,
    progress: bool,
) -> list[Tensor]:
    """The best factors and other parameters of all steps; nothing where the start is the best."""
    factors: list[Tensor] = [layer.factors for layer in layers]
    learned = factors + extra
    groups = [{"params": params, "lr": rate} for params, rate in zip((factors, extra), rates) if params]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = len(order)
    rising = max(1.0, warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / rising) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    least = report.losses[0] = _mean_loss(model, held_out, measure)
    best: list[Tensor] = []
    with block_bar("learn codes", steps, progress) as bar:
        for step, batch in enumerate(order, 1):
            with torch.enable_grad():
                value = _checked(measure(model, batch), step)
                optimizer.zero_grad()
                value.backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
            if step == steps or step % max(1, steps // LOOKS) == 0:
                now = report.losses[step] = _mean_loss(model, held_out, measure)
                bar.set_postfix_str(f"{now:.4f}")
                if now < least:
                    least, report.kept, best = now, step, [p.detach().clone() for p in learned]
    return best


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    found = getattr(model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}), "loss", None)
    if not isinstance(found, Tensor):
        raise CalibrationError("the model returns no loss for these batches: give them labels, or pass loss=.")
    return found


def _checked(value: Tensor, step: int) -> Tensor:
    if not bool(torch.isfinite(value)):
        raise CalibrationError(
            f"the loss is {float(value.detach())} at step {step}: use a smaller lr, or look for NaN in the batches."
        )
    return value


def _mean_loss(model: nn.Module, batches: list[Any], measure: Loss) -> float:
    with torch.no_grad():
        return sum(float(_checked(measure(model, batch), 0)) for batch in batches) / len(batches)


# --- what is learned ----------------------------------------------------------------------------------------------------


def _layers(model: nn.Module, original: nn.Module, first: int, report: LearningReport) -> list[LearnedLayer]:
    before = {id(m) for stack in stacks(model) for _, block in stack[:first] for m in block.modules()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for value in module.parameters(recurse=False):
            owners[id(value)] = owners.get(id(value), 0) + 1
    found, source = [], original
    for name, module in model.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            if not isinstance(value, IntScaleTensor) or id(module) in before:
                continue
            if leaf != "weight" or value.dim() != 2:
                report.skipped[f"{name}.{leaf}"] = "a stack of experts keeps its codes"
            elif owners[id(value)] > 1:
                raise ConfigError(f"{name}.{leaf} is shared by several layers: give each its own weight first.")
            else:
                dense = _original_weight(source, name, value)
                if dense is None and source is original:
                    source = _rotated(model, original, name)
                    dense = _original_weight(source, name, value)
                if dense is None:
                    raise ConfigError(_TRANSFORMED.format(name=name))
                found.append(LearnedLayer(name, module, dense))
                report.weights += value.numel()
    if not found:
        raise ConfigError(f"no weight of the model from layer {first} on is quantized: quantize it first.")
    return found


_TRANSFORMED = (
    "{name}.weight is far from the original one: original is another model, or the weights were smoothed before they were "
    "quantized, which depends on data: calibrate without smoothing."
)


def _original_weight(source: nn.Module, name: str, value: IntScaleTensor) -> Optional[Tensor]:
    """The original weight of a layer, unrotated; None where it is far from the quantized one."""
    try:
        module = source.get_submodule(name)
        weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    except AttributeError:
        raise ConfigError(f"original has no layer {name}: pass the model that was quantized.") from None
    if weight.shape != value.shape or hasattr(type(weight), "__tensor_flatten__"):
        found = f"{type(weight).__name__} {tuple(weight.shape)}"
        raise ConfigError(f"original: {name}.weight is {found}, the quantized one {tuple(value.shape)}.")
    if size := getattr(module, ROTATION, 0):  # the copy that was rotated here
        weight = hadamard_transform(weight.float(), size)
    now = value.dequantize(torch.float32)
    far = (weight.to(now.device).float() - now).norm() > ANOTHER_WEIGHT * now.norm()
    return None if bool(far) else weight.to(now.device)


def _rotated(model: nn.Module, original: nn.Module, name: str) -> nn.Module:
    """The original, rotated as the quantized model was.

    Raises:
        ConfigError: it was not, as far as it says.
    """
    stored = getattr(getattr(model, "config", None), CONFIG_ATTRIBUTE, None)
    config = None if stored is None else CalibrationConfig.from_dict(stored)
    if config is None or config.rotation == "none" or config.smoothing != "none":
        raise ConfigError(_TRANSFORMED.format(name=name))
    turned = copy.deepcopy(original)
    with torch.no_grad():
        rotate(turned, seed=config.seed)
    return turned


def _plain_parameters(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    found: list[Tensor] = []
    for wanted in names:
        pattern = re.compile(rf"(?:.*\.)?{re.escape(wanted)}(?:\..*)?")
        matched = [p for n, p in model.named_parameters() if pattern.fullmatch(n) and not isinstance(p, IntScaleTensor)]
        if not matched:
            raise ConfigError(f"also: no plain parameter is called {wanted!r} or belongs to a module of that name.")
        found += [p for p in matched if not any(p is q for q in found)]
    return found


# --- batches ------------------------------------------------------------------------------------------------------------


def _divided(batches: Any, seed: int) -> tuple[Any, list[Any]]:
    """Batches to learn from, and those held out."""
    if isinstance(batches, Mixed):
        for name in ("start", "end"):
            if not 0 <= getattr(batches, name) <= 1:
                raise ConfigError(f"Mixed.{name}={getattr(batches, name)!r} is not supported: use a share from 0 to 1.")
        (first, out), (second, other) = _divided(batches.multimodal, seed), _divided(batches.language, seed)
        return Mixed(first, second, batches.start, batches.end), out + other
    given = list(batches)
    if len(given) < 2:
        raise CalibrationError(f"{len(given)} batches: two are needed at least, one of them held out.")
    places = set(range(HELD_OUT - 1, len(given), HELD_OUT)) or {len(given) - 1}
    places = set(sorted(places)[:HELD_OUT])
    return [b for i, b in enumerate(given) if i not in places], [given[i] for i in sorted(places)]


def _order(train: Any, steps: int, warmup: float, seed: int) -> list[Any]:
    """The batch of every step."""
    generator = torch.Generator().manual_seed(seed)

    def endless(items: list[Any]):
        while True:
            yield from (items[i] for i in torch.randperm(len(items), generator=generator).tolist())

    if not isinstance(train, Mixed):
        return list(itertools.islice(endless(train), steps))
    first, second = endless(list(train.multimodal)), endless(list(train.language))
    rising = warmup * steps
    chosen = []
    for step in range(steps):
        done = max(0.0, step - rising) / max(1.0, steps - 1 - rising)
        share = train.start + (train.end - train.start) * done
        chosen.append(next(first) if float(torch.rand((), generator=generator)) < share else next(second))
    return chosen


def _check(steps: int, lr: float, warmup: float, first_layer: int, seed: int, also_lr: Optional[float]) -> None:
    def positive(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value) and value > 0

    rules = {
        "steps": (steps, type(steps) is int and steps > 0, "a positive integer"),
        "lr": (lr, positive(lr), "a positive number"),
        "also_lr": (also_lr, also_lr is None or positive(also_lr), "a positive number or None"),
        "warmup": (warmup, isinstance(warmup, (int, float)) and 0 <= warmup < 1, "a share from 0 to below 1"),
        "first_layer": (first_layer, type(first_layer) is int and first_layer >= 0, "an integer, 0 or more"),
        "seed": (seed, type(seed) is int and seed >= 0, "an integer, 0 or more"),
    }
    for name, (value, ok, allowed) in rules.items():
        if not ok:
            raise ConfigError(f"learn_codes: {name}={value!r} is not supported: use {allowed}.")
