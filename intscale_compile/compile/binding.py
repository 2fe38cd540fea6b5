"""Dynamo's graph before and after the passes: a copy to work on, and the compiled result behind the original signature.

A compiled graph takes codes and scales as inputs, not as frozen constants. At each call the parameters that the caller
passes decide which packed tensors go in (:mod:`~intscale_compile.passes.packed_weights`), also where one graph is shared by
many layers (regional compilation). What is noticed when a parameter changes: :mod:`~intscale_compile.passes.kept`.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, fx
from torch._C import DisableTorchFunctionSubclass
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import CompileError
from ..integrations.torch import copy_source
from ..integrations.torch_state import takes_tangents
from ..kernels.fingerprint import Sample
from ..passes import INTEGER_ONLY, PASSES, GraphRewrite, apply_passes
from ..passes.base import Observer
from ..passes.gpu_samples import GpuSamples
from ..passes.kept import forgotten, gpu_samples, parts_of, samples_of, state_of_weight
from ..passes.local_shards import takes_shards
from ..passes.positional import place_arguments
from ..passes.settings import Settings
from ..reasons import log_once
from ..tensors.intscale_tensor import IntScaleTensor
from .weight_guards import keep_outer_guards

log = logging.getLogger("intscale_compile")
_plain_version = operator.attrgetter("_version")
_address = Tensor.data_ptr


def rewrite_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    cuda_graphs: bool = False,
    observer: Optional[Observer] = None,
) -> GraphRewrite:
    """Run all passes over ``gm`` and say once what was left alone; ``observer`` as for ``apply_passes``."""
    rewrite = GraphRewrite(copied(gm), example_inputs, settings, cuda_graphs)
    place_arguments(rewrite.graph)
    apply_passes(rewrite, INTEGER_ONLY if settings.integer_only else PASSES, observer)
    refused = [c for c in rewrite.candidates if c.reason is not None]
    quantized = len(rewrite.candidates) - len(refused)
    log.info("graph with %d linear products: %d quantized (%s)", len(rewrite.candidates), quantized, rewrite.counts)
    if refused and not quantized:
        reasons = "; ".join(sorted({c.reason.value for c in refused if c.reason is not None}))
        log_once(
            logging.WARNING, f"a compiled graph has {len(refused)} linear products and none was quantized: {reasons}"
        )
    return rewrite


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph, not of its tensors: Dynamo reads the inputs of its own graph again after the backend returns."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, nodes, return_output_node=True)
    if isinstance(result, tuple):
        output = graph.output(result[0])
        output.meta = dict(result[1].meta)
    for old, new in nodes.items():
        copy_source(old, new)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    return copied


def bind(rewrite: GraphRewrite, compile_graph: Callable[[fx.GraphModule, list[Any]], Callable]) -> Callable:
    """Compile the rewritten graph and put it behind the original signature."""
    compiled = _bound(rewrite, compile_graph)
    indices = [index for index, *_ in rewrite.local_inputs.values()]
    return takes_shards(compiled, indices) if indices else compiled


def _bound(rewrite: GraphRewrite, compile_graph: Callable[[fx.GraphModule, list[Any]], Callable]) -> Callable:
    if not rewrite.packed_inputs:
        return compile_graph(rewrite.gm, list(rewrite.example_inputs))
    kept = _drop_replaced_weights(rewrite)
    inputs = [n for n in rewrite.graph.nodes if n.op == "placeholder"]
    packed = [rewrite.packed_inputs[n] for n in inputs if n in rewrite.packed_inputs]
    bound = BoundGraph(kept, packed)
    bound.compiled = compile_graph(rewrite.gm, bound.inputs(rewrite.example_inputs, _static))
    return torch._dynamo.disable(bound.__call__, reason="intscale binds packed weights")


def _static(value: Tensor) -> Tensor:
    """A fake tensor of static shape: packed weights keep their shapes under ``dynamic=True``."""
    mode = detect_fake_mode()
    return value if mode is None else mode.from_tensor(value, static_shapes=True)


def _drop_replaced_weights(rewrite: GraphRewrite) -> list[int]:
    """Erase the inputs that only fed quantized products, and most of their guards; returns the indices of those that stay."""
    replaced = {c.source.index for c in rewrite.candidates if c.packed is not None and c.source is not None}
    kept, dropped = [], []
    for i, node in enumerate(rewrite.placeholders()):
        if node.users or i not in replaced:
            kept.append(i)
        else:
            dropped.append((i, node))
            rewrite.graph.erase_node(node)
    keep_outer_guards([node for i, node in dropped if isinstance(rewrite.example_inputs[i], IntScaleTensor)])
    rewrite.gm.recompile()
    return kept


@dataclass
class _Binding:
    """The packed inputs for one set of weights.

    Attributes:
        states: of the weights whose data the packed inputs are copies of, from the arguments of a call.
        bound: what ``states`` gave when the copies were made.
        samples: of the memory of those weights that are on a CPU.
        gpus: what watches those on GPUs, each with what its ``look`` returned.
        forgotten: how often kept copies were forgotten before.
        values: packed inputs that are not inner tensors of a weight themselves.
        pick: takes the inputs of the compiled graph out of ``(*args, *inner tensors of the weights, *values)``.
        alive: weak references that drop this binding when a weight is gone.
    """

    states: Callable[[Sequence[Any]], tuple]
    bound: tuple
    samples: list[Sample]
    gpus: dict[GpuSamples, int]
    forgotten: int
    values: list[Tensor]
    pick: Callable[[Sequence[Any]], tuple]
    alive: list[weakref.ref]

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether the copies are those of the weights as they are."""
        for gpu, seen in self.gpus.items():
            self.gpus[gpu] = gpu.look(seen)
        return (
            self.forgotten == forgotten()
            and self.states(args) == self.bound
            and all([sample.same() for sample in self.samples])
        )


class BoundGraph:
    """A compiled graph behind the signature of the original one: swaps weights for packed tensors at each call.

    A call looks at the identity of every inner tensor of its weights. Packed inputs that are these tensors, or that they
    are row slices of, see every write; where a packed input is a copy, a call asks whether the weight has changed. What was
    bound for one set of weights is found again when the graph serves many layers.

    Args:
        kept: indices of the original inputs that the compiled graph still takes.
        packed: recipe and part (a data name of ``IntScaleTensor``, or None for the value itself) of each packed input.

    ``compiled`` is set afterwards; it takes the kept inputs, then the packed ones.

    Raises:
        CompileError: at a call, if an inner tensor of a weight was exchanged for one of another layout.
    """

    def __init__(self, kept: Sequence[int], packed: Sequence[tuple[Any, Optional[str]]]):
        self.compiled: Callable
        self._kept = tuple(kept)
        self._packed = tuple(packed)
        self._bindings: dict[tuple[int, ...], _Binding] = {}
        self._layouts: list[tuple] = []
        self._quantized: Optional[Callable[[Sequence[Any]], tuple]] = None
        self._plain: Callable[[Sequence[Any]], tuple]
        self._parts: list[Callable[[IntScaleTensor], tuple]]

    def inputs(self, args: Sequence[Any], convert: Callable[[Tensor], Tensor] = lambda value: value) -> list[Any]:
        """The arguments of the compiled graph for those of the original one; ``convert`` sees the packed ones."""
        given = self._given(args)
        packed = given[len(self._kept) :]
        self._layouts = list(map(_layout, packed))
        return [*given[: len(self._kept)], *map(convert, packed)]

    def _given(self, args: Sequence[Any]) -> tuple:
        with DisableTorchFunctionSubclass():  # otherwise each attribute of a tensor subclass costs some microseconds
            inner = self._inner(args)
            binding = self._bindings.get((*map(id, inner), *map(id, self._plain(args))))
            if binding is None or not binding.holds(args):
                binding = self._bind(args)
                inner = self._inner(args)  # binding may have exchanged inner tensors for slices of merged ones
            return binding.pick((*args, *inner, *binding.values))

    def _inner(self, args: Sequence[Any]) -> list[Tensor]:
        """Inner tensors of the quantized weights among the arguments."""
        if self._quantized is None:  # Dynamo guards types and attributes of inputs, so the first call decides
            watched = sorted({s.index for recipe, _ in self._packed for s in recipe.sources if s.index is not None})
            self._plain = _picker([i for i in watched if not isinstance(args[i], IntScaleTensor)])
            quantized = [i for i in watched if isinstance(args[i], IntScaleTensor)]
            self._quantized = _picker(quantized)
            self._parts = [operator.attrgetter(*args[i].data_names) for i in quantized]
        return [part for parts, weight in zip(self._parts, self._quantized(args)) for part in parts(weight)]

    def _bind(self, args: Sequence[Any]) -> _Binding:
        given, copied = [], _Copied(args)
        before = forgotten()
        for recipe, part in self._packed:
            value = recipe.resolve(args)
            given.append(value if part is None else getattr(value, part))
            copied.add(given[-1], recipe, part)
        self._check(given)
        inner, plain = self._inner(args), self._plain(args)
        place = {id(tensor): len(args) + i for i, tensor in enumerate(inner)}
        values = [value for value in given if id(value) not in place]
        place.update((id(value), len(args) + len(inner) + i) for i, value in enumerate(values))
        weights = copied.weights()
        states = copied.states()
        key = (*map(id, inner), *map(id, plain))
        forget = lambda _, key=key: self._bindings.pop(key, None)  # noqa: E731
        binding = _Binding(
            states,
            states(args),
            samples_of(weights),
            {gpu: gpu.started for gpu in gpu_samples(part for weight in weights for part in parts_of(weight))},
            before,
            values,
            _picker([*self._kept, *(place[id(value)] for value in given)]),
            [weakref.ref(tensor, forget) for tensor in (*inner, *plain)],
        )
        self._bindings[key] = binding
        return binding

    def _check(self, given: Sequence[Tensor]) -> None:
        """The inner tensors of a weight have no guards of their own."""
        for value, layout, (recipe, part) in zip(given, self._layouts, self._packed):
            if _layout(value) != layout:
                raise CompileError(
                    f"{recipe.sources[0].name}: {part or recipe.key[0]} has changed since its graph was compiled, from "
                    f"(shape, strides, dtype, device) {layout} to {_layout(value)}: call torch._dynamo.reset()."
                )

    def __call__(self, *args: Any) -> Any:
        """Run the compiled graph on the arguments of the original one.

        Raises:
            CompileError: tangents of ``torch.autograd.forward_ad`` would be lost on the way.
        """
        if takes_tangents():
            raise CompileError(
                "a graph with quantized products cannot carry tangents (torch.autograd.forward_ad): call the model itself there, "
                "or the compiled one outside of dual_level()."
            )
        return self.compiled(*self._given(args))


def _layout(value: Tensor) -> tuple:
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple]:
    """A function that returns the entries at ``indices`` as a tuple."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda entries: tuple(entries[i] for i in indices)


class _Copied:
    """The weights that packed inputs are copies of, so that these do not see a write to them."""

    def __init__(self, args: Sequence[Any]):
        self._args = args
        self._indices: set[int] = set()
        self._constants: dict[int, Tensor] = {}

    def add(self, value: Tensor, recipe: Any, part: Optional[str]) -> None:
        """Note the sources of ``recipe`` that ``value`` shares no memory with."""
        memory = value.untyped_storage().data_ptr()
        for source in recipe.sources:
            weight = source.tensor(self._args)
            inner = getattr(weight, part) if part is not None and isinstance(weight, IntScaleTensor) else None
            if inner is not None and inner.untyped_storage().data_ptr() == memory:
                continue
            if source.index is None:
                self._constants[id(weight)] = weight
            else:
                self._indices.add(source.index)

    def weights(self) -> list[Tensor]:
        """The weights of this call."""
        return [*(self._args[i] for i in sorted(self._indices)), *self._constants.values()]

    def states(self) -> Callable[[Sequence[Any]], tuple]:
        """A function from the arguments of a call to the states of the weights."""
        pick, constants = _picker(sorted(self._indices)), tuple(self._constants.values())
        if all(_counts_writes(weight) for weight in self.weights()):  # without a call of ours for each
            return lambda args: _plain_states((*pick(args), *constants))
        return lambda args: tuple(map(state_of_weight, (*pick(args), *constants)))


def _counts_writes(weight: Tensor) -> bool:
    return not isinstance(weight, (IntScaleTensor, FakeTensor)) and not weight.is_inference()


def _plain_states(weights: Sequence[Tensor]) -> tuple:
    return tuple(map(_plain_version, weights)), tuple(map(_address, weights))
