"""``compare``: which layer of a model computes something else than the same layer of another one."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import InputError
from .captured import split_inputs
from .judge import Call, Judge, LayerComparison, decibels_text
from .noise import jittered
from .sqnr import float_tensors, sqnr


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`; ``print`` it for a table.

    Attributes:
        layers: in the order in which they finished.
        output_sqnr: dB of what the models return.
        noise_floor: dB between two outputs of ``model_b`` whose inputs differ in their last bits (:mod:`~.noise`).
        unmatched: modules that only one of the models has, or called.
    """

    layers: tuple[LayerComparison, ...]
    output_sqnr: float
    noise_floor: float
    unmatched: tuple[str, ...]

    @property
    def first(self) -> Optional[LayerComparison]:
        """The first layer that deviates, or None."""
        return next((layer for layer in self.layers if layer.deviates), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; infinities as text: "inf" for equal outputs, "-inf" where there is NaN or infinity."""
        layers = [{key: _plain(value) for key, value in asdict(layer).items()} for layer in self.layers]
        first = self.first
        return {
            "first": first.name if first else None,
            "output_sqnr": _plain(self.output_sqnr),
            "noise_floor": _plain(self.noise_floor),
            "layers": layers,
            "unmatched": list(self.unmatched),
        }

    def __str__(self) -> str:
        shown = [layer for layer in self.layers if layer.local is not None]
        rows = [("layer", "output dB", "alone dB", "expected dB", "")]
        rows += [
            (s.name, decibels_text(s.sqnr), decibels_text(s.local), decibels_text(s.expected), _mark(s)) for s in shown
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:4], widths[1:])), r[4]]) for r in rows
        ]
        lines = [line.rstrip() for line in lines]
        if self.unmatched:
            lines.append(f"not in both models: {', '.join(self.unmatched)}")
        first = self.first
        found = "no layer deviates" if first is None else f"first layer that deviates: {first.name} ({first.note})"
        floor = "" if math.isinf(self.noise_floor) else f" (noise floor {decibels_text(self.noise_floor)} dB)"
        return "\n".join([*lines, "", f"output: {decibels_text(self.output_sqnr)} dB{floor}; {found}"])

    __repr__ = __str__


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _mark(layer: LayerComparison) -> str:
    return f"<- {layer.note}" if layer.deviates else layer.note


def compare(model_a: nn.Module, model_b: nn.Module, inputs: Any, *, bound: Optional[float] = None) -> Comparison:
    """Compare two models layer by layer: SQNR of every module's output, and of every layer alone.

    Runs both without gradients, in evaluation mode and not compiled. A layer alone gets the input that it has in
    ``model_a``, so that errors of the layers before it do not count; scales of channels that were moved from one layer
    into another (smoothing) are taken out. Inputs and outputs of all layers of ``model_a`` are kept meanwhile: a short input
    suffices.

    Args:
        model_a: the reference, compiled or not.
        model_b: the model in question, with the same module names: a quantized copy.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        bound: dB; a layer that is below it alone deviates. The default goes by what rounding predicts for each layer, and
            looks for single groups of weights that are far off.

    Raises:
        InputError: the models are one object, or have no module in common.
    """
    model_a, model_b = getattr(model_a, "_orig_mod", model_a), getattr(model_b, "_orig_mod", model_b)
    if model_a is model_b:
        raise InputError("model_a and model_b are one object: keep a copy of the model before quantize_.")
    reference: dict[str, Call] = {}
    made: dict[int, tuple[Tensor, str]] = {}  # outputs, which live on so that their ids stay theirs, and who made them
    judge = Judge(dict(model_a.named_modules()), bound)

    def keep(name: str, module: nn.Module, call: Call) -> None:
        leaf = not any(True for _ in module.children())
        args = tree_map(_copy, (call.args, call.kwargs)) if leaf else ((), {})
        producer = made.get(id(call.first_input), (None, None))[1] if leaf else None
        made[id(call.output)] = call.output, name
        reference[name] = Call(args[0], args[1], call.output.detach().clone(), producer)

    def see(name: str, module: nn.Module, call: Call) -> None:
        if name in reference and call.output.shape == reference[name].output.shape:
            judge.see(name, module, reference.pop(name), call)

    with torch.no_grad():
        output_a = _run(model_a, inputs, keep)
        made.clear()
        output_b = _run(model_b, inputs, see)
        with jittered(model_b):
            again = _run(model_b, inputs, lambda *_: None)
    output_sqnr = sqnr(output_a, output_b) if judge.layers else 0.0
    layers = judge.verdicts(output_sqnr)
    if not layers:
        raise InputError("the models have no module with the same name and output shape: compare copies of one model.")
    names = {layer.name for layer in layers}
    only_b = {n for n, _ in model_b.named_modules() if n and n not in judge.modules}
    unmatched = tuple(sorted({n for n in reference if n not in names} | only_b))
    return Comparison(layers, output_sqnr, sqnr(output_b, again), unmatched)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _run(model: nn.Module, inputs: Any, see: Callable[[str, nn.Module, Call], None]) -> Any:
    """Call the model; ``see`` gets every call of a module that returned a floating-point tensor."""
    counts: dict[str, int] = {}
    handles = []

    def hook(name: str) -> Callable:
        def call(module, args, kwargs, output):
            tensors = float_tensors(output)
            if tensors:
                count = counts[name] = counts.get(name, 0) + 1
                see(name if count == 1 else f"{name}[{count - 1}]", module, Call(args, kwargs, tensors[0]))

        return call

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    try:
        args, kwargs = copy.deepcopy(split_inputs(inputs))
        with evaluating(model):
            return model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
