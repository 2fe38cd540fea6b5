"""What ``compare`` thinks of a layer: measured alone, against what rounding predicts for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from torch import Tensor, finfo, nn

from ..tensors.intscale_tensor import IntScaleTensor
from .sqnr import as_stored, as_taken, dequantized, float_tensors, predicted, rescaled, sqnr, worst_group

MARGIN = 6.0  # dB below the prediction that a layer may be: integer scales with one amplifier cost up to 4 dB
GROUP_MARGIN = 12.0  # dB above the predicted error that one group of weights may be
HEALTHY = 5.0  # dB of a module around a layer whose channels are rescaled: then others make up for it


@dataclass(frozen=True)
class LayerComparison:
    """One call of a module.

    Attributes:
        name: of the module; with ``[1]`` and so on for further calls.
        kind: its class.
        sqnr: dB of its output in the second model, with all errors of the layers before it.
        local: dB of its output in the second model for the input that it has in the first; None where it holds no tensors.
        expected: dB that rounding predicts for ``local``: of int4 weights and int8 activations where it is quantized,
            of its dtype elsewhere.
        deviates: whether ``local`` is below the bound, or a group of weights is wrong.
        note: what else is known.
    """

    name: str
    kind: str
    sqnr: float
    local: Optional[float]
    expected: Optional[float]
    deviates: bool
    note: str = ""


def decibels_text(value: Optional[float]) -> str:
    """dB with one decimal, or ``equal``, ``NaN``, ``-``."""
    if value is None:
        return "-"
    return "equal" if value == math.inf else "NaN" if value == -math.inf else f"{value:.1f}"


@dataclass
class Call:
    """One call of a module: arguments, first floating-point result, and which call made its first input."""

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor
    producer: Optional[str] = None

    @property
    def first_input(self) -> Optional[Tensor]:
        """The first floating-point argument."""
        return next(iter(float_tensors((self.args, self.kwargs))), None)


class Judge:
    """Compares calls of modules, in the order in which they finish.

    Args:
        modules: of the reference, by name.
        bound: dB; see ``compare``.
    """

    def __init__(self, modules: Mapping[str, nn.Module], bound: Optional[float]):
        self.modules, self.layers = modules, list[LayerComparison]()
        self._bound = bound
        self._factors: dict[str, Optional[Tensor]] = {}  # by call, of its output channels, free of earlier errors

    def see(self, name: str, module: nn.Module, a: Call, b: Call) -> None:
        """Judge one call: ``a`` of the reference, ``b`` of the other model, whose module is given."""
        whole, kind = sqnr(a.output, b.output), type(module).__name__
        own = self.modules.get(name.partition("[")[0])
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own is None or not tensors or any(True for _ in module.children()):
            self.layers.append(LayerComparison(name, kind, whole, None, None, False))
            return
        factors = self._input_factors(own, module, a, b)
        args, kwargs = _as_given(a, b, factors)
        alone = float_tensors(module.forward(*args, **kwargs))[0]
        rows = self._factors[name] = _output_factors(own, module, a, alone, factors)
        target = a.output if rows is None else a.output * rows.to(a.output)
        local = sqnr(target, alone)
        expected, wrong = _expectation(own, module, replace(a, output=target), b, factors, rows)
        limit = self._bound if self._bound is not None else expected - MARGIN
        notes = [] if factors is None else ["input channels rescaled"]
        notes += [] if rows is None else ["output channels rescaled"]
        notes += [f"{decibels_text(local)} dB alone, at least {limit:.1f} expected"] if local < limit else []
        notes += [wrong] if wrong and self._bound is None else []
        deviates = local < limit or bool(wrong and self._bound is None)
        self.layers.append(LayerComparison(name, kind, whole, local, expected, deviates, "; ".join(notes)))

    def verdicts(self, output_sqnr: float) -> tuple[LayerComparison, ...]:
        """All layers; those with rescaled outputs deviate unless what is around them came out right."""
        around = {layer.name: layer.sqnr for layer in self.layers if layer.local is None}
        found = []
        for layer in self.layers:
            if self._factors.get(layer.name) is not None and not layer.deviates:
                parents = [name for name in around if layer.name.startswith(f"{name}.")]
                healthy = around[max(parents, key=len)] if parents else output_sqnr
                where = max(parents, key=len) if parents else "the output"
                if healthy < (HEALTHY if self._bound is None else self._bound):
                    note = f"{layer.note}, and nothing makes up for it: {where} is at {decibels_text(healthy)} dB"
                    layer = replace(layer, deviates=True, note=note)
            found.append(layer)
        return tuple(found)

    def _input_factors(self, own: nn.Module, module: nn.Module, a: Call, b: Call) -> Optional[Tensor]:
        """How the channels of the input are rescaled: as the module that made it says, else as the weight says."""
        if a.producer in self._factors:
            return self._factors[a.producer]
        x, y = a.first_input, b.first_input
        if x is None or y is None or all(parameter.dim() < 2 for parameter in module.parameters(recurse=False)):
            return None
        for weight, packed in quantized_pairs(own, module):
            if not packed.rotation and packed.input_order is None and packed.dim() == 2:
                columns = rescaled(as_stored(weight, packed), dequantized(packed))
                factors = None if columns is None else 1 / columns
                fits = (
                    factors is not None and sqnr(y, x * factors.to(x)) > sqnr(y, x) + 1
                )  # not the fault of the weight
                return factors if fits else None
        return rescaled(x, y, gain=6.0)  # earlier errors have a part that looks like a scale of channels


def quantized_pairs(own: nn.Module, module: nn.Module) -> Iterator[tuple[Tensor, IntScaleTensor]]:
    """The weights of a module that are quantized, each after what it is in the reference."""
    for name, packed in module.named_parameters(recurse=False):
        weight = getattr(own, name, None)
        if isinstance(packed, IntScaleTensor) and isinstance(weight, Tensor) and weight.shape == packed.shape:
            yield weight, packed


def _output_factors(
    own: nn.Module, module: nn.Module, a: Call, alone: Tensor, factors: Optional[Tensor]
) -> Optional[Tensor]:
    """How the channels of the output are rescaled: as a quantized weight says, else as the output does."""
    for weight, packed in quantized_pairs(own, module):
        if packed.dim() == 2:
            return rescaled(as_stored(weight, packed, factors).mT, dequantized(packed).mT)
    return rescaled(a.output, alone)


def _as_given(a: Call, b: Call, factors: Optional[Tensor]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of the first model for the module of the second: its dtypes and devices, its scale of input channels."""
    seen: list[Tensor] = []

    def fit(value: Any, like: Any) -> Any:
        if not isinstance(value, Tensor) or not isinstance(like, Tensor):
            return value
        if factors is not None and value.is_floating_point() and not seen:
            value = value * factors.to(value)
        seen.append(value)
        return value.to(like.device, like.dtype)

    args = tuple(fit(x, y) for x, y in zip(a.args, b.args))
    return args, {key: fit(value, b.kwargs.get(key)) for key, value in a.kwargs.items()}


def _expectation(
    own: nn.Module, module: nn.Module, a: Call, b: Call, factors: Optional[Tensor], rows: Optional[Tensor]
) -> tuple[float, str]:
    """Expected dB of a layer alone, and which group of weights is wrong, if one is.

    ``factors`` and ``rows``: how its input and output channels are rescaled.
    """
    dtypes = (a.output.dtype, b.output.dtype)
    expected = -20 * math.log10(max(finfo(dtype).eps for dtype in dtypes))
    worst, wrong = GROUP_MARGIN, ""
    for weight, packed in quantized_pairs(own, module):
        dense = as_stored(weight, packed, factors)
        dense = dense if rows is None or rows.shape[0] != dense.shape[-2] else dense * rows.to(dense)[:, None]
        x = _activation(a, packed, factors) if packed.dim() == 2 else None
        expected = min(expected, predicted(dense, packed, x, a.output))
        excess, place = worst_group(dense, packed, x)
        if excess > worst:
            worst, at = excess, " ".join(f"{k} {i}" for k, i in zip(("group", "row", "expert"), reversed(place)))
            wrong = f"weight: error of {at} is {excess:.0f} dB above what rounding gives"
    return expected, wrong


def _activation(a: Call, packed: IntScaleTensor, factors: Optional[Tensor]) -> Optional[Tensor]:
    """The activation of a linear in the form that the stored weight takes; None where the module's input is something else."""
    x = a.first_input
    if x is None or x.shape[-1] != packed.in_features:
        return None
    x = x.float() if factors is None else x.float() * factors.to(x.device).float()
    return as_taken(x, packed)
