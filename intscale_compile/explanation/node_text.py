"""One node of a graph as a line of Python that a reader understands."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import _get_qualified_name

from ..passes.base import example

INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.and_: "&", operator.or_: "|",
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}  # fmt: skip
SHORT_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u"}
HIDDEN = {"abi"}  # of our ops: the same number everywhere


def expression(node: fx.Node, name: Callable[[fx.Node], str]) -> str:
    """What a node computes; ``name`` says what its inputs are called."""
    values = [value(a, name) for a in node.args]
    keywords = [f"{key}={value(a, name)}" for key, a in node.kwargs.items()]
    if node.op == "call_method":
        return f"{values[0]}.{node.target}({', '.join([*values[1:], *keywords])})"
    if node.target is operator.getitem:
        return f"{values[0]}[{_index(node.args[1], name)}]"
    if node.target is operator.neg:
        return f"-{values[0]}"
    if node.target in INFIX and len(values) == 2:
        return f"{values[0]} {INFIX[node.target]} {values[1]}"  # type: ignore[index]
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "intscale":
        values = _ours(node, name)
    return f"{_function(node.target)}({', '.join([*values, *keywords])})"


def _ours(node: fx.Node, name: Callable[[fx.Node], str]) -> list[str]:
    """Arguments of one of our ops: tensors by place, the rest by the names of the schema where they are not None."""
    shown = []
    by_place = True
    for argument, given in zip(node.target._schema.arguments, node.args):  # type: ignore[union-attr]
        by_place = by_place and isinstance(given, fx.Node)
        if argument.name not in HIDDEN and given is not None:
            shown.append(value(given, name) if by_place else f"{argument.name}={value(given, name)}")
    return shown


def _function(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    text = _get_qualified_name(target)
    for long, short in (("torch._C._nn.", "F."), ("torch.nn.functional.", "F."), ("torch.functional.", "torch.")):
        if text.startswith(long):
            return short + text.removeprefix(long)
    return text.removeprefix("_operator.")


def value(argument: Any, name: Callable[[fx.Node], str]) -> str:
    """An argument of a node as Python."""
    if isinstance(argument, fx.Node):
        return name(argument)
    if isinstance(argument, slice):
        return f"slice({', '.join(value(a, name) for a in (argument.start, argument.stop, argument.step))})"
    if isinstance(argument, (list, tuple)):
        inside = ", ".join(value(a, name) for a in argument)
        return f"[{inside}]" if isinstance(argument, list) else f"({inside},)" if len(argument) == 1 else f"({inside})"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{key!r}: {value(a, name)}" for key, a in argument.items()) + "}"
    if argument is Ellipsis:
        return "..."
    if isinstance(argument, torch.device):
        return repr(str(argument))
    return repr(argument)


def _index(index: Any, name: Callable[[fx.Node], str]) -> str:
    parts = index if isinstance(index, tuple) and index else (index,)
    return ", ".join(_slice(p, name) if isinstance(p, slice) else value(p, name) for p in parts)


def _slice(part: slice, name: Callable[[fx.Node], str]) -> str:
    start, stop, step = ("" if a is None else value(a, name) for a in (part.start, part.stop, part.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")


def kind(node: fx.Node) -> str:
    """``bf16[2, 64, 384]`` of a node's result; empty where it is no tensor."""
    result = example(node)
    results = result if isinstance(result, (list, tuple)) else [result]
    return ", ".join(_kind(r) for r in results if isinstance(r, Tensor))


def _kind(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    stem = dtype.rstrip("0123456789")
    short = SHORT_DTYPES.get(stem, stem) + dtype[len(stem) :]
    return f"{short}[{', '.join(map(str, tensor.shape))}]"
