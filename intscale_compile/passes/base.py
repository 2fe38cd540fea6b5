"""What all passes share: the graph under rewrite, its candidates, and the emission of nodes with true metadata."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import arg_tree_leaves

from ..config import IntScaleConfig
from ..integrations.torch import mark_static_input
from ..reasons import Reason
from ..tensors.intscale_tensor import IntScaleTensor
from .collective_report import CollectiveReport
from .packed_weights import Packed, WeightSource
from .settings import Settings
from .whole_models import WholeModels

EXAMPLE = "example_value"  # where Dynamo keeps a node's fake tensor


@dataclass
class Candidate:
    """One product of an activation with a constant weight.

    Attributes:
        node: the product in the original graph.
        name: dotted name of the weight.
        x, weight, bias: its operands; ``weight`` is the node as the product uses it.
        source: the weight itself; None where it is computed.
        transposed: whether the source is kept as ``[K, N]``.
        shape: ``(N, K)``, or None where it is not a matrix.
        reason: why it was left alone; None when it was quantized.
        packed: the quantized weight, when it was.
        merged_into: name of the GEMM that it became part of, if any.
        tokens: rows of the activation (a number, or a symbol's text).
        config: how its weight is quantized, where that is not as the settings say for all.
    """

    node: fx.Node
    name: str
    x: Optional[fx.Node]
    weight: fx.Node
    bias: Optional[fx.Node]
    source: Optional[WeightSource]
    transposed: bool
    shape: Optional[tuple[int, int]]
    reason: Optional[Reason] = None
    packed: Optional[IntScaleTensor] = None
    merged_into: Optional[str] = None
    tokens: str = "?"
    config: Optional[IntScaleConfig] = None


@dataclass
class GraphRewrite:
    """A Dynamo graph while the passes work on it.

    Attributes:
        gm: the graph module; its nodes carry fake tensors under ``example_value``.
        example_inputs: the arguments of this compilation, in placeholder order.
        settings: options of the backend.
        cuda_graphs: whether Inductor will capture the graph in CUDA graphs, so that launches cost the host nothing.
        candidates: filled by the match pass.
        packed_inputs: placeholders that the passes added, with their recipe and part.
        local_inputs: placeholders that take the local tensor where the caller passes a DTensor: with the index of the
            argument, what the placeholder stood for, and its readers then.
        counts: how often each pass matched.
        seconds: how long each pass took.
        unlike: pairs of weights that read one activation and are not merged, by how they read it.
        models: the models that the graph is a part of.
        collectives: what became of each collective; None where Inductor had the graph in its cache, so that the pass over
            collectives did not run.
    """

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    settings: Settings
    cuda_graphs: bool = False
    candidates: list[Candidate] = field(default_factory=list)
    packed_inputs: dict[fx.Node, tuple[Any, Optional[str]]] = field(default_factory=dict)
    local_inputs: dict[fx.Node, tuple[int, Any, tuple[fx.Node, ...]]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    unlike: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    collectives: Optional[tuple[CollectiveReport, ...]] = ()
    models: WholeModels = field(init=False)
    fake_mode: Any = None
    _packed_nodes: dict[tuple, fx.Node] = field(default_factory=dict)
    _last_input: Optional[fx.Node] = None
    input_index: dict[fx.Node, int] = field(default_factory=dict)  # of the inputs that the caller provides
    _nodes: list[fx.Node] = field(default_factory=list)  # every node that there was, also those erased since

    def __post_init__(self) -> None:
        self._nodes = list(self.graph.nodes)
        self.input_index = {node: i for i, node in enumerate(self.placeholders())}
        self.models = WholeModels(self.input_index)
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        self._last_input = inputs[-1] if inputs else None
        # The mode that the nodes' tensors belong to; by now Dynamo has put a fresh one into its tracing context.
        values = (example(n) for n in self.graph.nodes)
        self.fake_mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)

    @property
    def graph(self) -> fx.Graph:
        """The graph of ``gm``."""
        return self.gm.graph

    def placeholders(self) -> list[fx.Node]:
        """The inputs that the caller provides, in order; without those that the passes added."""
        return [n for n in self.graph.nodes if n.op == "placeholder" and n not in self.packed_inputs]

    def add_packed_input(self, recipe: Any, part: Optional[str], value: Tensor) -> fx.Node:
        """A new graph input for one tensor of a packed weight (or a joined bias); the same node for the same recipe and part."""
        key = (recipe.key, part)
        if key in self._packed_nodes:
            return self._packed_nodes[key]
        first = next(iter(self.graph.nodes))
        anchor = self._last_input
        with self.graph.inserting_before(first) if anchor is None else self.graph.inserting_after(anchor):
            node = self.graph.placeholder(f"intscale_{part or recipe.key[0]}_{len(self.packed_inputs)}")
        self._last_input = self._packed_nodes[key] = node
        self._nodes.append(node)
        mark_static_input(node)
        node.meta[EXAMPLE] = value
        if self.fake_mode is not None:  # milliseconds cheaper than to convert the tensor itself
            with self.fake_mode:
                node.meta[EXAMPLE] = torch.empty_strided(
                    tuple(value.shape), value.stride(), dtype=value.dtype, device=value.device
                )
        self.packed_inputs[node] = (recipe, part)
        return node

    def drop_unused_packed_inputs(self) -> None:
        """Erase the inputs that passes added and later passes left without a reader."""
        for key, node in list(self._packed_nodes.items()):
            if not node.users:
                del self._packed_nodes[key], self.packed_inputs[node]
                self.graph.erase_node(node)
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        self._last_input = inputs[-1] if inputs else None

    def release(self) -> None:
        """Let go of weights and fake tensors once the graph is compiled: AOTAutograd keeps the graph module for good, a fx
        graph remembers erased nodes, and a fake tensor's mode holds references to parameters that make ``Module.to`` fail.
        """
        for node in (*self._nodes, *self.graph.nodes):
            node.meta.clear()
        self.candidates.clear()

    def call(
        self,
        target: Callable,
        args: tuple,
        kwargs: Optional[dict] = None,
        like: Optional[fx.Node] = None,
        value: Any = None,
    ) -> fx.Node:
        """Emit ``target(*args)`` at the insertion point with a true ``example_value`` and the origin of ``like``.

        ``value`` is the ``example_value`` where the caller knows it: computing one takes milliseconds.
        """
        node = self.graph.call_function(target, args, kwargs or {})
        self._nodes.append(node)
        if like is not None:
            for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
                if key in like.meta:
                    node.meta[key] = like.meta[key]
        if value is None:
            self.set_example(node)
        else:
            node.meta[EXAMPLE] = value
        return node

    def item(self, node: fx.Node, index: int, like: fx.Node) -> fx.Node:
        """Emit ``node[index]`` of a node with several results."""
        return self.call(operator.getitem, (node, index), like=like)

    def set_example(self, node: fx.Node) -> None:
        """Compute a node's fake tensor from those of its arguments; unset where one of them has none."""
        if self.fake_mode is None or any(example(n) is None for n in node.all_input_nodes):
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), example)
        # Composite ops such as linear need the Python dispatcher to see symbolic sizes (torch 2.11).
        with self.fake_mode, torch.no_grad(), enable_python_dispatcher():
            if node.op == "call_method":
                node.meta[EXAMPLE] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta[EXAMPLE] = node.target(*args, **kwargs)  # type: ignore[operator]


def argument(node: fx.Node, position: int, *names: str) -> Any:
    """An argument of a call, by position or by one of its names; None where it is not given."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def example(node: Any) -> Any:
    """The fake tensor of a node, or None."""
    return node.meta.get(EXAMPLE, node.meta.get("val")) if isinstance(node, fx.Node) else node


def module_path(node: fx.Node) -> str:
    """``model.layers.0.mlp`` from the stack of modules that Dynamo noted, or an empty text."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = next(reversed(stack.values()))[0]
    path = path.partition("]")[2] if path.startswith("L[") else path
    return (
        path.replace("_modules.", "").replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".")
    )


@dataclass(frozen=True)
class Pass:
    """A rewrite with its name; ``run`` returns how many places it changed and changes none when run again."""

    name: str
    run: Callable[[GraphRewrite], int]


Observer = Callable[[str, GraphRewrite], None]  # sees the graph after the stage of that name


def apply_passes(rewrite: GraphRewrite, passes: Sequence[Pass], observer: Optional[Observer] = None) -> None:
    """Run passes in order, but those that the settings disable; remove what became dead, and check the graph.

    ``observer`` is called with ``"dynamo"`` before the first pass and with the name of each pass after it; it changes nothing.
    """
    if observer is not None:
        observer("dynamo", rewrite)
    for one in passes:
        start = time.perf_counter()
        count = 0 if one.name in rewrite.settings.disable_passes else one.run(rewrite)
        rewrite.counts[one.name] = rewrite.counts.get(one.name, 0) + count
        rewrite.seconds[one.name] = rewrite.seconds.get(one.name, 0.0) + time.perf_counter() - start
        if observer is not None:
            observer(one.name, rewrite)
    remove_dead(rewrite)
    rewrite.graph.lint()
    rewrite.gm.recompile()


_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
IN_PLACE_OPERATORS = {operator.setitem, *(getattr(operator, f"i{name}") for name in _ARITHMETIC)}
NOT_IN_PLACE = {operator.and_, operator.or_, operator.not_, operator.is_}  # a keyword of Python, hence the underscore
IN_PLACE_METHODS = {"__setitem__", *(f"__i{name}__" for name in _ARITHMETIC)}


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node may write into one of its inputs: by name, by ``out=`` or ``inplace=``, by schema, or unknowable."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    flagged = bool(node.kwargs.get("inplace")) or (
        getattr(target, "__module__", "") == "torch.nn.functional" and any(a is True for a in node.args)
    )
    return (
        flagged
        or "out" in node.kwargs
        or target in IN_PLACE_OPERATORS
        or name in IN_PLACE_METHODS
        or (name.endswith("_") and not name.endswith("__") and target not in NOT_IN_PLACE)
    )


def writes_to(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node may write into ``value``, one of its inputs: the first of ``addmm_``, ``out`` of ``mm``."""
    if not writes_in_place(node):
        return False
    target, out = node.target, node.kwargs.get("out")
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if isinstance(target, torch._ops.OpOverload):
        given = dict(zip((a.name for a in target._schema.arguments), node.args)) | node.kwargs
        written = [
            given.get(a.name) for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
    elif name.endswith("_") and not name.endswith("__") and name not in ("set_", "swap_"):
        written = [node.args[:1], out]
    elif out is not None and not node.kwargs.get("inplace"):
        written = [out]
    else:
        return True
    return any(leaf is value for leaf in arg_tree_leaves(written))


QUANTIZATION_NAMESPACE = "intscale"


def is_ours(node: fx.Node) -> bool:
    """Whether a node calls one of our ops."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == QUANTIZATION_NAMESPACE


REARRANGES = {
    *(
        "t",
        "T",
        "numpy_T",
        "mT",
        "H",
        "mH",
        "matrix_H",
        "adjoint",
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
    ),
    *(
        "moveaxis",
        "contiguous",
        "to",
        "detach",
        "view",
        "view_as",
        "reshape",
        "squeeze",
        "unsqueeze",
        "getattr",
        "getitem",
    ),
    *("repeat_interleave", "_get_data_attr"),
}


def remove_dead(rewrite: GraphRewrite) -> None:
    """Erase unused nodes that are ours or only rearranged a weight, and unused packed inputs."""
    for node in reversed(list(rewrite.graph.nodes)):
        if node.users or node.op in ("output", "placeholder"):
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if is_ours(node) or name.split(".")[0] in REARRANGES or node.op == "get_attr":
            rewrite.graph.erase_node(node)
    rewrite.drop_unused_packed_inputs()


def weight_recipe(node: fx.Node) -> Packed:
    """The recipe behind a ``dequantize_weight`` node."""
    return node.meta["intscale_recipe"]
