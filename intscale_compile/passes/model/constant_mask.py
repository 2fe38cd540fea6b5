"""What an attention mask holds when no value that the caller passes decides it: computed once, while the graph compiles.

    "all":     it hides nothing
    "causal":  query q sees key k where k <= q, as many keys as queries
    None:      anything else, or unknown

A mask is computed where it depends on nothing but numbers and static sizes, through functions that are listed here:
each gives the same values every time and writes into none of its arguments. A mask that something in the graph may write
into, or with an intermediate result of more than :data:`MOST_ELEMENTS`, is unknown.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Optional

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..base import GraphRewrite, example, writes_in_place

MOST_ELEMENTS = 8192 * 8192
MOST_HIDING = -1e30  # added to a score, this leaves exactly nothing of its weight beside a score that is not hidden

_CREATED = {"arange", "full", "ones", "tensor", "zeros"}
_LIKE = {"full_like", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"}  # read the size of a tensor alone
_VIEWS = {
    "broadcast_to", "contiguous", "expand", "expand_as", "flatten", "getitem", "permute", "reshape", "squeeze", "t",
    "transpose", "unsqueeze", "view", "view_as",
}  # fmt: skip
_COMPUTED = {
    "abs", "add", "all", "and", "and_", "any", "bitwise_and", "bitwise_not", "bitwise_or", "bool", "cat", "clamp", "clone",
    "cumsum", "diff", "eq", "float", "floordiv", "ge", "gt", "int", "invert", "le", "logical_and", "logical_not",
    "logical_or", "long", "lt", "masked_fill", "maximum", "minimum", "mod", "mul", "ne", "neg", "or", "or_", "repeat",
    "repeat_interleave", "stack", "sub", "to", "tril", "triu", "type_as", "where",
}  # fmt: skip
_KNOWN = _CREATED | _LIKE | _VIEWS | _COMPUTED


def function_name(node: fx.Node) -> Optional[str]:
    """Name of the function of torch or operator, or of the tensor method, that a node calls: ``eq`` also for ``__eq__``."""
    if node.op == "call_method":
        name = str(node.target)
        return name[2:-2] if name.startswith("__") and name.endswith("__") else name
    name = getattr(node.target, "__name__", "")
    known = node.op == "call_function" and node.target in (getattr(torch, name, None), getattr(operator, name, None))
    return name if known else None


class ConstantMasks:
    """The masks of one graph, each looked at once."""

    def __init__(self, rewrite: GraphRewrite):
        self._rewrite = rewrite
        self._values: dict[fx.Node, Any] = {}
        self._kinds: dict[fx.Node, Optional[str]] = {}

    def kind(self, mask: fx.Node) -> Optional[str]:
        """``"all"``, ``"causal"`` or None (see above)."""
        if mask not in self._kinds:
            nodes = history(mask)
            computable = all(map(_can_compute, nodes)) and untouched(self._rewrite.graph, nodes)
            self._kinds[mask] = self._compute(mask) if computable else None
        return self._kinds[mask]

    def _compute(self, mask: fx.Node) -> Optional[str]:
        try:
            with unset_fake_temporarily(), torch.no_grad(), torch.device("cpu"):
                return kind_of(self._value(mask))
        except (RuntimeError, TypeError):  # what a CPU cannot compute is no reason not to compile
            return None

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            name = function_name(node)
            arguments = node.args
            if name in _LIKE:
                like = example(arguments[0])
                arguments = (torch.empty(1, dtype=like.dtype).expand(like.shape), *arguments[1:])
            args, kwargs = fx.node.map_aggregate((arguments, node.kwargs), self._argument)
            if node.op == "call_method":
                self._values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self._value(argument)
        on_gpu = isinstance(argument, torch.device) or (isinstance(argument, str) and argument.startswith("cuda"))
        return torch.device("cpu") if on_gpu else argument


def kind_of(mask: Any) -> Optional[str]:
    """The kind of a mask that is known."""
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        return None
    shown, hidden = (mask, ~mask) if mask.dtype is torch.bool else (mask == 0, mask.float() <= MOST_HIDING)
    if bool(shown.all()):
        return "all"
    queries, keys = mask.shape[-2:]
    causal = torch.ones(queries, keys, dtype=torch.bool).tril()
    square = queries == keys
    return "causal" if square and bool((shown == causal).all()) and bool((hidden == ~causal).all()) else None


def history(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from; a tensor of which only the size is read is not part of it."""
    found, waiting = {node: None}, [node]
    while waiting:
        one = waiting.pop()
        inputs = one.all_input_nodes
        if function_name(one) in _LIKE:
            inputs = [n for n in inputs if n is not one.args[0]]
        waiting.extend(n for n in inputs if n not in found)
        found.update(dict.fromkeys(inputs))
    return list(found)


def _can_compute(node: fx.Node) -> bool:
    if function_name(node) not in _KNOWN:
        return False
    value = example(node.args[0]) if function_name(node) in _LIKE else None
    sizes = [x.shape for x in (value, example(node)) if isinstance(x, Tensor)]
    static = all(isinstance(size, int) for shape in sizes for size in shape)
    return len(sizes) > 0 and static and math.prod(sizes[-1]) <= MOST_ELEMENTS


def untouched(graph: fx.Graph, nodes: list[fx.Node]) -> bool:
    """Whether no node of the graph may write into the memory of one of ``nodes``."""
    if any(example(node) is None for node in nodes):
        return False
    memory = {_storage(node) for node in nodes} - {None}
    return not any(_storage(n) in memory for writer in graph.nodes if writes_in_place(writer) for n in _written(writer))


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node may write into."""
    first = node.args[0] if node.args else None
    plain = "out" not in node.kwargs and (node.op == "call_method" or function_name(node) is not None)
    return [first] if plain and isinstance(first, fx.Node) else node.all_input_nodes


def _storage(node: fx.Node) -> Optional[int]:
    value = example(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def erase_unread(node: fx.Node) -> None:
    """Erase ``node`` and what it was computed from, as far as nothing else reads it."""
    own = {n for n in history(node) if function_name(n) in _KNOWN}
    for one in reversed(list(node.graph.nodes) if not node.users else []):
        if one in own and not one.users:
            one.graph.erase_node(one)
