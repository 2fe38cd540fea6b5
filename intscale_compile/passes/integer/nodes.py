"""What the passes over integer-only models share: names of operators, numbers, codes in the place of quantizations."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ...kernels.quantize_per_token import OP as QUANTIZE
from ...ops import hadamard
from ..base import GraphRewrite, example, writes_in_place
from ..match import function_name

WAS_FLOAT = "intscale_was_float"  # on nodes that held floating point values before the integer passes


def name_of(node: Any) -> str:
    """``"mul"`` for every form of a product; an empty text for what is no call."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    return function_name(node).strip("_")


def is_float(value: Any) -> bool:
    """Whether a value is a floating point tensor, or holds one."""
    if isinstance(value, (tuple, list)):
        return any(map(is_float, value))
    return isinstance(value, Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)


def number(value: Any) -> Optional[float]:
    """A number of the graph; one that Dynamo made symbolic becomes a constant, guarded as such. None for anything else."""
    value = example(value)
    if isinstance(value, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool):
        return float(value)
    return None


def binary(node: Any, name: str) -> Optional[tuple[Any, Any]]:
    """The operands of ``a * b`` or ``a + b`` that writes into neither, or None."""
    alpha = isinstance(node, fx.Node) and node.kwargs.get("alpha", 1)
    if name_of(node) != name or len(node.args) != 2 or writes_in_place(node) or alpha not in (1, True):
        return None
    return node.args[0], node.args[1]


def either(node: Any, name: str, test: Callable[[Any, Any], Any]) -> Any:
    """The first result of ``test(a, b)`` or ``test(b, a)`` on the operands that is not None."""
    operands = binary(node, name)
    if operands is None:
        return None
    a, b = operands
    found = test(a, b)
    return found if found is not None else test(b, a)


def erase_unread(node: Any) -> None:
    """Erase a node that nothing reads, and then what only it read; inputs stay."""
    if isinstance(node, fx.Node) and not node._erased and not node.users and node.op not in ("placeholder", "output"):
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            erase_unread(source)


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a node chooses among the rows of its input: ``x[:, -1:, :]``."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    index: Any = node.args[1]
    whole = slice(None, None, None)
    return not any(i is None for i in index) and (
        index[-1] in (whole, Ellipsis) or (Ellipsis not in index and len(index) < example(node.args[0]).dim())
    )


def _quantization(reader: fx.Node) -> Optional[tuple[fx.Node, list[Any], int]]:
    """``(quantize node, choices of rows before it, rotation)`` behind one reader of a value, or None."""
    rows: list[Any] = []
    while _keeps_rows(reader) and len(reader.users) == 1:
        rows.append(reader.args[1])
        reader = next(iter(reader.users))
    rotation = 0
    if reader.target is hadamard.HADAMARD_OP and len(reader.users) == 1:
        rotation = int(reader.args[1])  # type: ignore[arg-type]
        reader = next(iter(reader.users))
    return (reader, rows, rotation) if reader.target is QUANTIZE else None


def emitter(rewrite: GraphRewrite, op: Any, arguments: tuple, like: fx.Node) -> Callable[[int], fx.Node]:
    """For :func:`codes_for_readers`: a call of ``op`` with the arguments, and the rotation behind them."""

    def emit(rotation: int) -> fx.Node:
        return rewrite.call(op, (*arguments, rotation), like=like)

    return emit


def codes_for_readers(rewrite: GraphRewrite, value: fx.Node, emit: Callable[[int], fx.Node]) -> int:
    """Give the readers of ``value`` that quantize it the codes of a fused op; returns how many there were.

    Args:
        emit: makes the op for a rotation; its results are codes and token scales of the rows of ``value``.
    """
    done = 0
    for reader in list(value.users):
        found = _quantization(reader)
        if found is None:
            continue
        quantize, rows, rotation = found
        with rewrite.graph.inserting_before(quantize):
            made = emit(rotation)
            results = [rewrite.item(made, i, quantize) for i in (0, 1)]
            for index in rows:
                results = [rewrite.call(operator.getitem, (result, index), like=quantize) for result in results]
        for item in list(quantize.users):
            item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
            rewrite.graph.erase_node(item)
        erase_unread(quantize)
        done += 1
    return done
