"""A model whose graphs run in any state of rewriting: what ``bisect`` tries."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn

from ..compile.binding import bind, copied
from ..passes import PASSES
from ..passes.base import GraphRewrite, Pass, apply_passes
from ..passes.match import dotted_name
from ..passes.settings import Settings
from ..tensors.intscale_tensor import IntScaleTensor

_calls = itertools.count()


def fresh_call() -> Callable:
    """A function that calls a model, with a code object of its own: Dynamo keeps what it compiles by code object, so
    neither what the user compiled before nor its recompilation limit is touched."""

    def call(model, args, kwargs):
        return model(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(co_name=f"captured_{next(_calls)}"), globals())


class _Graph:
    """One graph of Dynamo; ``run`` is what it computes at present."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]):
        self.gm, self.example_inputs = gm, list(example_inputs)
        self.run: Callable = gm.forward

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


class CapturedModel:
    """A model captured by Dynamo once; graph breaks are fine. Runs without gradients, each time on a copy of the inputs.

    Args:
        module: not compiled.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        settings: of the backend.
        originals: high-precision weights by name, for those layers of a quantized model that are turned off.
    """

    def __init__(self, module: nn.Module, inputs: Any, settings: Settings, originals: Mapping[str, Tensor]):
        self._module, self._settings, self._originals = module, settings, originals
        self._inputs = split_inputs(inputs)
        self.graphs: list[_Graph] = []
        self._compiled = torch.compile(fresh_call(), backend=self._capture)
        self.original = self._call()
        self.layers = self._find_layers()

    def _capture(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        self.graphs.append(_Graph(gm, example_inputs))
        return self.graphs[-1].__call__

    def _call(self) -> Any:
        args, kwargs = copy.deepcopy(self._inputs)
        with torch.no_grad():
            return self._compiled(self._module, args, kwargs)

    def run(self, passes: Sequence[Pass], off: Collection[str] = ()) -> Any:
        """What the model returns after some passes, in plain PyTorch, with the layers in ``off`` in high precision."""
        for graph in self.graphs:
            rewrite, exchanged = self._rewrite(graph, passes, off)
            graph.run = _exchanging(bind(rewrite, lambda module, _: module.forward), exchanged)
        return self._call()

    def _rewrite(
        self, graph: _Graph, passes: Sequence[Pass], off: Collection[str]
    ) -> tuple[GraphRewrite, dict[int, Tensor]]:
        exchanged = {i: self._originals[n] for i, n in self._quantized(graph) if n in off and n in self._originals}
        inputs = [exchanged.get(i, value) for i, value in enumerate(graph.example_inputs)]
        skip = (*self._settings.skip, *map(re.escape, off))
        with torch.no_grad():
            rewrite = GraphRewrite(copied(graph.gm), inputs, dataclasses.replace(self._settings, skip=skip))
            apply_passes(rewrite, passes)
        return rewrite, exchanged

    def _quantized(self, graph: _Graph) -> list[tuple[int, str]]:
        """Index and name of the inputs that are quantized weights."""

        nodes = [node for node in graph.gm.graph.nodes if node.op == "placeholder"]
        pairs = zip(itertools.count(), nodes, graph.example_inputs)
        return [(i, dotted_name(node)) for i, node, value in pairs if isinstance(value, IntScaleTensor)]

    def _find_layers(self) -> tuple[str, ...]:
        """Names of the weights whose products are quantized, in order of execution."""

        first = [one for one in PASSES if one.name in ("match", "insert_qdq", "experts")]
        found: dict[str, None] = {}
        for graph in self.graphs:
            rewrite, _ = self._rewrite(graph, first, ())
            found.update((c.name, None) for c in rewrite.candidates if c.packed is not None)
        return tuple(found)


def _exchanging(run: Callable, exchanged: Mapping[int, Tensor]) -> Callable:
    """``run`` with some of its arguments exchanged."""
    if not exchanged:
        return run
    return lambda *args: run(*(exchanged.get(i, value) for i, value in enumerate(args)))


def split_inputs(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def weights_by_name(model: Optional[nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of the uncompiled model, by dotted name."""
    if model is None:
        return {}
    module = getattr(model, "_orig_mod", model)
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
