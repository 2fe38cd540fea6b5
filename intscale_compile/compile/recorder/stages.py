"""The graph after each pass, recorded while the passes run: names and arguments, never tensors.

A record costs about a microsecond for a node that did not change since the stage before and some for one that did, so
every compilation is recorded. Text is made from it only when somebody reads it (``python_code``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, fx

from ...passes.base import Candidate, GraphRewrite, example, module_path
from ...passes.match import dotted_name
from ...tensors.intscale_tensor import IntScaleTensor

SMALL = 16  # entries of a constant tensor that are recorded themselves


@dataclass(frozen=True, slots=True)
class Read:
    """Another node's value among the arguments of a node."""

    name: str


class Step(NamedTuple):
    """One node of a recorded graph.

    Attributes:
        name: of the node, and of the variable in its Python.
        op, target: as in ``torch.fx``.
        args, kwargs: with ``Read`` for other nodes.
        value: dtype and shape of the result, as text.
        module: dotted path of the module that the node comes from.
    """

    name: str
    op: str
    target: Any
    args: tuple
    kwargs: Mapping[str, Any]
    value: str
    module: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the nodes among the arguments, each once, in order."""
        found: dict[str, None] = {}

        def note(value: Any) -> Any:
            if isinstance(value, Read):
                found[value.name] = None
            return value

        fx.node.map_aggregate((self.args, dict(self.kwargs)), note)
        return tuple(found)


class InputRecord(NamedTuple):
    """What a placeholder or a constant of the graph takes.

    Attributes:
        meaning: in words: which weight, which part of a packed weight, or an argument of the model.
        example: a Python expression for a value of the right shape and dtype; empty for a graph.
        steps, inputs: of a graph that the graph calls (checkpoint, cond).
    """

    meaning: str
    example: str
    steps: tuple[Step, ...] = ()
    inputs: Mapping[str, InputRecord] = {}  # never written to


@dataclass(frozen=True)
class Product:
    """A product with a weight, as the passes decided on it.

    Attributes:
        name: dotted name of the weight.
        shape: ``(N, K)``, or None where the weight is not a matrix.
        tokens: rows of the activation.
        reason: name and words of the reason why it was left alone; None where it was quantized.
    """

    name: str
    shape: Optional[tuple[int, int]]
    tokens: str
    reason: Optional[str]


@dataclass(frozen=True)
class RecordedStage:
    """One stage: ``products`` maps the nodes that compute products to indices into the compilation's products."""

    name: str
    count: int
    steps: tuple[Step, ...]
    products: Mapping[str, tuple[int, ...]]


@dataclass
class StageRecorder:
    """Records a graph at every call; an ``Observer`` of ``apply_passes``.

    ``finish`` lets go of the nodes; until then they are kept to find out which of them did not change.
    """

    stages: list[RecordedStage] = field(default_factory=list)
    inputs: dict[str, InputRecord] = field(default_factory=dict)
    products: tuple[Product, ...] = ()
    _steps: dict[fx.Node, tuple[Any, Any, Step]] = field(default_factory=dict)

    def __call__(self, name: str, rewrite: GraphRewrite) -> None:
        """Record the graph as it is."""
        steps = tuple(self._step(node, rewrite) for node in rewrite.graph.nodes)
        self.stages.append(RecordedStage(name, rewrite.counts.get(name, 0), steps, _products(rewrite)))

    def finish(self, rewrite: GraphRewrite) -> None:
        """Note what was decided and forget the nodes."""
        self._steps.clear()
        self.products = tuple(map(_product, rewrite.candidates))
        first, *others = self.stages
        present = {step.name for step in first.steps}
        nodes = {c.node.name: (i,) for i, c in enumerate(rewrite.candidates) if c.node.name in present}
        self.stages = [RecordedStage(first.name, first.count, first.steps, nodes), *others]

    def _step(self, node: fx.Node, rewrite: GraphRewrite) -> Step:
        known = self._steps.get(node)
        if known is not None and known[0] is node._args and known[1] is node._kwargs:
            return known[2]
        value = known[2].value if known is not None else describe(example(node))
        module = known[2].module if known is not None else module_path(node)
        args, kwargs = _names(node)
        step = Step(node.name, node.op, node.target, args, kwargs, value, module)
        self._steps[node] = (node._args, node._kwargs, step)
        if known is None and node.op in ("placeholder", "get_attr"):
            self.inputs[node.name] = _input(node, rewrite)
        return step


def _products(rewrite: GraphRewrite) -> dict[str, tuple[int, ...]]:
    index = {id(candidate): i for i, candidate in enumerate(rewrite.candidates)}
    products = {
        node.name: tuple(index[id(c)] for c in found if id(c) in index)
        for node in rewrite.graph.nodes
        if (found := node.meta.get("intscale_candidates"))
    }
    left = {c.node.name: (i,) for i, c in enumerate(rewrite.candidates) if c.packed is None}
    return {**left, **products}


def _product(candidate: Candidate) -> Product:
    reason = candidate.reason
    words = None if candidate.packed is not None else f"{reason.name}: {reason.value}" if reason else "not quantized"
    return Product(candidate.name, candidate.shape, candidate.tokens, words)


def _names(node: fx.Node) -> Any:
    """Arguments of a node, other nodes by name."""
    return fx.map_arg((node.args, node.kwargs), lambda n: Read(n.name))  # type: ignore[arg-type, return-value]


def describe(value: Any) -> str:
    """dtype and shape of a fake tensor, of several, or the type of something else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {_sizes(value)}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(describe, value))
    return "" if value is None else type(value).__name__


def _sizes(value: Tensor) -> str:
    return "[" + ", ".join(map(str, value.shape)) + "]"


def _input(node: fx.Node, rewrite: GraphRewrite) -> InputRecord:
    if node.op == "get_attr":
        held: Any = rewrite.gm
        for attribute in str(node.target).split("."):
            held = getattr(held, attribute, None)
        return subgraph(held) if isinstance(held, fx.GraphModule) else InputRecord("constant", _constant(held))
    if node in rewrite.packed_inputs:
        recipe, part = rewrite.packed_inputs[node]
        return InputRecord(f"{part or 'bias'} of " + " + ".join(s.name for s in recipe.sources), _packed(node, part))
    value = rewrite.example_inputs[rewrite.input_index[node]]
    name = dotted_name(node)
    meaning = f"argument of the model: {node.name}" if name == node.name else name
    return InputRecord(meaning, _expression(value))


def subgraph(module: fx.GraphModule) -> InputRecord:
    """A graph that the graph calls; passes do not enter it, so it has no packed inputs."""
    steps, inputs = [], {}
    for node in module.graph.nodes:
        args, kwargs = _names(node)
        value = describe(example(node))
        steps.append(Step(node.name, node.op, node.target, args, kwargs, value, module_path(node)))
        if node.op == "get_attr":
            held = getattr(module, str(node.target), None)
            inputs[node.name] = (
                subgraph(held) if isinstance(held, fx.GraphModule) else InputRecord("constant", _constant(held))
            )
    return InputRecord("graph", "", tuple(steps), inputs)


def _constant(value: Any) -> str:
    if type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and value.numel() <= SMALL and not value.is_meta:
        return f"torch.tensor({value.tolist()}, dtype={value.dtype}{_device(value)})"
    return _expression(value)


def _packed(node: fx.Node, part: Optional[str]) -> str:
    """Codes may be anything; integer scales are at least 1, float ones are small and positive."""
    value: Tensor = example(node)
    like = f"dtype={value.dtype}{_device(value)}"
    if part == "qdata":
        least, most = (-127, 128) if value.dtype == torch.int8 else (0, 256)
        return f"torch.randint({least}, {most}, {_hints(value)}, {like})"
    if part == "scale":
        return f"torch.randint(1, 16, {_hints(value)}, {like})"
    fill = "zeros" if part in (None, "zero_point") else "full"
    number = "0.01, " if fill == "full" else ""
    return f"torch.{fill}({_hints(value)}, {number}{like})"


def _expression(value: Any) -> str:
    if isinstance(value, IntScaleTensor):
        config = f"IntScaleConfig(group_size={value.group_size}, weight_bits={value.weight_bits})"
        shape = [*value.qdata.shape[:-2], value.out_features, value.in_features]
        dense = f"torch.randn({shape}, dtype={value.dtype}{_device(value)})"
        made = f"intscale_compile.IntScaleTensor.from_hp({dense}, intscale_compile.{config})"
        return f"{made}.mT" if value.transposed else made
    if isinstance(value, Tensor):
        like = f"{_hints(value)}, dtype={value.dtype}{_device(value)}"
        if value.dtype.is_floating_point or value.dtype.is_complex:
            return f"torch.randn({like})" if value.dtype.itemsize > 1 else f"torch.zeros({like})"
        return f"torch.ones({like})" if value.dtype == torch.bool else f"torch.zeros({like})"
    return repr(hint(value)) if isinstance(value, (int, float, bool, torch.SymInt)) else "None"


def _hints(value: Tensor) -> str:
    return repr([hint(size) for size in value.shape])


def hint(size: Any) -> Any:
    """The number behind a symbolic size at compile time, without a guard on it; 2 where there is none."""
    if not isinstance(size, torch.SymInt):
        return size
    known = size.node.hint
    return 2 if known is None else int(known)


def _device(value: Tensor) -> str:
    return "" if value.device.type == "cpu" else f", device={str(value.device)!r}"


def changed(before: RecordedStage, after: RecordedStage) -> bool:
    """Whether a stage has other nodes or other arguments than the one before; equal steps are one object."""
    return len(before.steps) != len(after.steps) or any(a is not b for a, b in zip(before.steps, after.steps))


def differences(before: RecordedStage, after: RecordedStage) -> Iterator[tuple[str, Step]]:
    """``("-", step)`` for steps that went or changed, ``("+", step)`` for new or changed ones."""
    old, new = {id(s) for s in before.steps}, {id(s) for s in after.steps}
    yield from (("-", step) for step in before.steps if id(step) not in new)
    yield from (("+", step) for step in after.steps if id(step) not in old)
