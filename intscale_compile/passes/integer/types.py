"""Integer types, the first part of the proof: everything between ids and results is integers. Emits nothing.

Computes the types of all nodes anew, now that their operands are integers, and refuses the graph if a node between ids and
results is floating point, with every such node, its source line and the mend. So it refuses keys and values that the model
returns in floating point. What is left of the float form and has no reader is erased.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ...errors import IntegerOnlyError
from ...kernels.integer.attention import ATTENTION_OP
from ...kernels.integer.pointwise import TO_FLOAT_OP
from ..base import EXAMPLE, GraphRewrite, Pass, example, is_ours
from .nodes import WAS_FLOAT, erase_unread, is_float, name_of
from .refusals import describe

MOVES = {
    "view", "reshape", "transpose", "permute", "contiguous", "getitem", "split", "chunk", "expand", "unsqueeze", "squeeze",
    "flatten", "unflatten", "cat", "clone", "narrow", "select", "repeat_interleave", "tensor_split", "unbind", "index_select",
    "swapaxes", "detach", "t", "movedim", "stack", "view_as", "slice", "all_gather_into_tensor", "wait_tensor",
}  # fmt: skip


def integer_types(rewrite: GraphRewrite) -> int:
    """Compute all types; returns 0.

    Raises:
        IntegerOnlyError: a node is floating point.
    """
    for node in reversed(list(rewrite.graph.nodes)):
        if node.meta.get(WAS_FLOAT) and node.op != "placeholder":
            erase_unread(node)
    output = next(node for node in rewrite.graph.nodes if node.op == "output")
    _refuse_caches(output)
    _types(rewrite)
    found = [node for node in rewrite.graph.nodes if _is_float_node(node)]
    found = [node for node in found if not is_ours(node)] or found  # causes, not what follows from them
    if found:
        raise IntegerOnlyError(describe(found), tuple(node.name for node in found))
    return 0


INTEGER_TYPES = Pass("integer_types", integer_types)


def _refuse_caches(output: fx.Node) -> None:
    results = [node.args[0] for node in output.all_input_nodes if node.target is TO_FLOAT_OP]
    kept = [node for node in results if isinstance(node, fx.Node) and _is_of_cache(node)]
    if kept:
        raise IntegerOnlyError(
            "the model returns keys and values in floating point "
            f"({', '.join(node.name for node in kept[:4])}{' ...' if len(kept) > 4 else ''}): pass use_cache=False, or "
            "past_key_values=intscale_compile.integer_only.IntegerCache().",
            tuple(node.name for node in kept),
        )


def _is_of_cache(node: fx.Node) -> bool:
    """Whether attention reads the value, as keys or values."""
    readers = set(node.users)
    codes = {item for reader in readers if is_ours(reader) for item in reader.users if item.target is operator.getitem}
    return any(reader.target is ATTENTION_OP for item in codes for reader in item.users)


def _types(rewrite: GraphRewrite) -> None:
    """Examples of all nodes behind one whose example is new."""
    changed: set[fx.Node] = set()
    for node in rewrite.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if is_ours(node) or not changed.isdisjoint(node.all_input_nodes):
            before = example(node)
            try:
                rewrite.set_example(node)
            except Exception:  # whatever a float operator makes of integers: it is one of the nodes that are refused
                node.meta[WAS_FLOAT] = True
                continue
            if is_ours(node) or not _same(before, node.meta.get(EXAMPLE)):
                changed.add(node)


def _same(a: Any, b: Any) -> bool:
    return getattr(a, "dtype", None) == getattr(b, "dtype", 0) and getattr(a, "shape", None) == getattr(b, "shape", 0)


def _is_float_node(node: fx.Node) -> bool:
    """Whether a node computes with floating point values, or with integers that stand for them in a way of its own."""
    if node.op not in ("call_function", "call_method") or node.target is TO_FLOAT_OP:
        return False
    floats = is_float(example(node)) or any(is_float(example(n)) for n in node.all_input_nodes)
    if is_ours(node):
        return floats
    return floats or bool(node.meta.get(WAS_FLOAT)) and name_of(node) not in MOVES
