"""``bisect``: which pass, and which layer, an error comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from ..compile import binding
from ..compile.options import parse_options
from ..errors import InputError
from ..passes.base import Pass
from .captured import CapturedModel, split_inputs, weights_by_name
from .comparison import evaluating
from .sqnr import sqnr

ROUNDING = ("insert_qdq", "experts")  # passes that change results on purpose
LEAST = 5.0  # dB of the whole output that quantization may leave, where no bound is given
SAME = 20.0  # dB between stages whose passes only rearrange; bf16 rounds differently in each
MOST_LAYERS = 8  # that are named


@dataclass(frozen=True)
class PassTrial:
    """The model run in plain PyTorch after one pass.

    Attributes:
        name: of the pass; ``"dynamo"`` before the first.
        sqnr: dB of the output against the reference; None where it raised an error.
        step: dB against the stage before.
        bad: whether this stage is below the bound.
        error: what it raised.
    """

    name: str
    sqnr: Optional[float]
    step: Optional[float]
    bad: bool
    error: str = ""


@dataclass(frozen=True)
class LayerTrial:
    """One run with some layers quantized, the others in high precision."""

    quantized: int
    last: str
    sqnr: float
    bad: bool


@dataclass(frozen=True)
class Culprit:
    """A layer whose quantization takes the output below the bound; ``alone``: dB with no other layer quantized."""

    name: str
    alone: float


@dataclass(frozen=True)
class Bisection:
    """The result of :func:`bisect`; ``print`` it for what was tried.

    Attributes:
        responsible_pass: name of the first pass after which the result is bad; None where none is.
        layers: the layers that it comes from, in the order in which they were found; empty where it is not a layer's.
        passes, layer_trials: what was tried.
        bound: dB; None for the default, which goes by what each pass may change.
    """

    responsible_pass: Optional[str]
    layers: tuple[Culprit, ...]
    passes: tuple[PassTrial, ...]
    layer_trials: tuple[LayerTrial, ...]
    bound: Optional[float]

    @property
    def found(self) -> bool:
        """Whether something is wrong."""
        return any(trial.bad for trial in self.passes)

    def __str__(self) -> str:
        lines = [f"{'after pass':20} {'dB':>7} {'against the stage before':>26}"]
        for p in self.passes:
            text = f"{p.name:20} {_db(p.sqnr):>7} {_db(p.step):>26}{'  <- bad' if p.bad else ''}"
            lines.append(f"{text}  {p.error}".rstrip())
        for trial in self.layer_trials:
            layers = f"layers up to {trial.last}" if trial.quantized else "no layer"
            lines.append(f"{layers} ({trial.quantized}): {_db(trial.sqnr)} dB{', bad' if trial.bad else ''}")
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        if not self.found:
            bound = "what the passes may change" if self.bound is None else f"{self.bound:g} dB"
            return f"nothing is wrong: no stage is below {bound}."
        by = f"pass: {self.responsible_pass}" if self.responsible_pass else "the model is wrong before any pass"
        if not self.layers:
            return f"{by}; not the quantization of a layer."
        return f"{by}; layers: " + ", ".join(f"{c.name} (alone {_db(c.alone)} dB)" for c in self.layers)

    __repr__ = __str__


def _db(value: Optional[float]) -> str:
    if value is None:
        return "-"
    return "equal" if value == float("inf") else "NaN" if value == float("-inf") else f"{value:.1f}"


def bisect(
    model: nn.Module,
    inputs: Any,
    *,
    bound: Optional[float] = None,
    reference: Optional[nn.Module] = None,
    passes: Optional[Sequence[Pass]] = None,
    options: Optional[dict] = None,
) -> Bisection:
    """Find the pass, and the layers, that take the output of a compiled model away from that of the original.

    Captures the model once, runs its graphs after each pass in plain PyTorch, and where one is bad searches for the layers
    by turning their quantization on and off. Inductor does not take part: if nothing is found here, it is Inductor or a kernel.

    Args:
        model: compiled or not.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        bound: dB that the output must keep against the reference at every stage. The default: 5 dB after passes that round
            (``insert_qdq``, ``experts``), and 20 dB against the stage before after all others.
        reference: the model before ``quantize_``. Without it the reference is ``model`` as it is, so wrong stored codes or
            scales of a quantized model cannot show.
        passes: the default is what the backend runs.
        options: as for ``torch.compile``.

    Raises:
        ConfigError: an option is unknown.
        InputError: nothing of the model is compiled, or its outputs hold no floating-point tensors.
    """
    settings, _ = parse_options(None, options)
    passes = tuple(binding.PASSES if passes is None else passes)
    module = getattr(model, "_orig_mod", model)
    with evaluating(module):
        captured = CapturedModel(module, inputs, settings, weights_by_name(reference))
        if not captured.graphs:
            raise InputError("no graph of this model was captured: it has nothing to compile for these inputs.")
        expected = captured.original if reference is None else _reference_output(reference, inputs)
        trials = _try_passes(captured, passes, expected, bound, reference is not None)
        bad = next((i for i, trial in enumerate(trials) if trial.bad), None)
        layers: list[Culprit] = []
        layer_trials: list[LayerTrial] = []
        if bad is not None and not trials[bad].error:
            error, limit = _criterion(captured, passes, bad, trials, expected, bound)
            layers, layer_trials = _search(captured.layers, error, limit)
    responsible = None if bad in (None, 0) else trials[bad].name
    return Bisection(responsible, tuple(layers), tuple(trials), tuple(layer_trials), bound)


def _reference_output(reference: nn.Module, inputs: Any) -> Any:
    reference = getattr(reference, "_orig_mod", reference)
    args, kwargs = copy.deepcopy(split_inputs(inputs))
    with torch.no_grad(), evaluating(reference):
        return reference(*args, **kwargs)


def _try_passes(
    captured: CapturedModel, passes: Sequence[Pass], expected: Any, bound: Optional[float], quantized: bool
) -> list[PassTrial]:
    whole = sqnr(expected, captured.original)
    trials = [PassTrial("dynamo", whole, None, quantized and whole < (LEAST if bound is None else bound))]
    before = captured.original
    for i, one in enumerate(passes):
        try:
            output = captured.run(passes[: i + 1])
            whole, step = sqnr(expected, output), sqnr(before, output)
        except Exception as error:  # a wrong pass may raise anything, here or in the graph that it left
            trials.append(PassTrial(one.name, None, None, True, f"{type(error).__name__}: {error}".split("\n")[0]))
            break
        if bound is not None:
            bad = whole < bound
        else:
            bad = whole < LEAST if one.name in ROUNDING else step < SAME
        trials.append(PassTrial(one.name, whole, step, bad))
        before = output
    return trials


def _criterion(
    captured: CapturedModel,
    passes: Sequence[Pass],
    bad: int,
    trials: Sequence[PassTrial],
    expected: Any,
    bound: Optional[float],
) -> tuple[Callable[[set[str]], float], float]:
    """A function from the layers that are turned off to dB, and the dB below which it is bad."""
    if bound is None and bad > 0 and trials[bad].name not in ROUNDING:
        return lambda off: sqnr(captured.run(passes[: bad - 1], off), captured.run(passes[:bad], off)), SAME
    return lambda off: sqnr(expected, captured.run(passes[:bad], off)), LEAST if bound is None else bound


def _search(
    layers: Sequence[str], error: Callable[[set[str]], float], limit: float
) -> tuple[list[Culprit], list[LayerTrial]]:
    """Binary search for the first layer with which the result is bad; then again without it, while it still is bad."""
    trials: list[LayerTrial] = []
    culprits: list[Culprit] = []
    known: set[str] = set()

    def is_bad(count: int) -> bool:
        on = [name for name in layers[:count] if name not in known]
        value = error(set(layers) - set(on))
        trials.append(LayerTrial(len(on), on[-1] if on else "", value, value < limit))
        return value < limit

    if not layers or is_bad(0):
        return [], trials
    while len(culprits) < MOST_LAYERS and is_bad(len(layers)):
        low, high = 0, len(layers)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_bad(middle) else (middle, high)
        name = layers[high - 1]
        known.add(name)
        culprits.append(Culprit(name, error(set(layers) - {name})))
    return culprits, trials
