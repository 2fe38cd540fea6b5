"""Weights that a module reads itself instead of calling the layer that owns them, found in the source of its ``forward``.

A quantized weight serves as the right operand of a product. Mamba multiplies ``self.dt_proj.weight @ x``, WavLM hands the
weights of its projections to ``F.multi_head_attention_forward``, MobileBERT concatenates one with another. The layers look
like any others, so only the code that uses them tells. ``forward`` and the methods that it calls on ``self`` are read; where
there is no source, nothing is known.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, Optional

from ..reasons import Reason

MATMULS = {"matmul", "mm", "bmm"}
JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
ATTENTION = "multi_head_attention_forward"


@functools.lru_cache(maxsize=4096)
def weight_reads(kind: type) -> dict[str, Reason]:
    """Dotted names of children of a class whose weights it reads in a form that a quantized weight does not have, and why."""
    found: dict[str, Reason] = {}
    for tree, me in _methods(kind):
        for node in ast.walk(tree):
            for value, reason in _unserved(node, me):
                path = _path(value, me)
                if path and path.endswith(".weight"):
                    found.setdefault(path.removesuffix(".weight"), reason)
    return found


@functools.lru_cache(maxsize=4096)
def stacks_in_a_loop(kind: type) -> frozenset[str]:
    """Names of parameters of a class that its ``forward`` takes apart for products: ``F.linear(x, self.name[i])``."""
    calls = [(node, me) for tree, me in _methods(kind) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    weights = [(call.args[1], me) for call, me in calls if _called(call) == "linear" and len(call.args) > 1]
    chosen = [_path(weight.value, me) for weight, me in weights if isinstance(weight, ast.Subscript)]
    return frozenset(name for name in chosen if name)


def _methods(kind: type) -> Iterator[tuple[ast.AST, str]]:
    """``forward`` and every method that it reaches through ``self``: the syntax tree of each, and what it calls ``self``."""
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        tree = None if name in seen else _tree(getattr(kind, name, None))
        seen.add(name)
        if tree is None or not tree.args.args:
            continue
        me = tree.args.args[0].arg
        yield tree, me
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        waiting += [path for call in calls if (path := _path(call, me)) and "." not in path]


def _tree(method: Any) -> Optional[ast.FunctionDef]:
    if not callable(method) or not inspect.isfunction(inspect.unwrap(method)):
        return None
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    except (
        OSError,
        TypeError,
        SyntaxError,
        ValueError,
    ):  # defined in an interpreter, compiled, or cut out of its context
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _unserved(node: ast.AST, me: str) -> Iterator[tuple[ast.AST, Reason]]:
    """Operands of one expression that cannot be quantized weights."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield _bare(node.left), Reason.LEFT_OPERAND
    if not isinstance(node, ast.Call):
        return
    name = _called(node)
    if name in MATMULS and isinstance(node.func, ast.Attribute):
        method = _path(_bare(node.func.value), me)  # self.layer.weight.matmul(x)
        left = node.func.value if method else node.args[0] if node.args else None
        if left is not None:
            yield _bare(left), Reason.LEFT_OPERAND
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    if name == ATTENTION:
        yield from ((_bare(value), Reason.ONE_OPERATOR) for value in values)
    if name in JOINS:
        parts = [part for value in values if isinstance(value, (ast.List, ast.Tuple)) for part in value.elts]
        yield from ((_bare(part), Reason.NOT_CONSTANT) for part in parts)


def _called(call: ast.Call) -> str:
    """Last part of the name of the function that is called."""
    func = call.func
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _bare(node: ast.AST) -> ast.AST:
    """A value without transposes, casts and choices of entries around it."""
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _called(node) in _REARRANGE:
            node = node.func.value
        elif isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in ("T", "mT", "data")):
            node = node.value
        else:
            return node


_REARRANGE = {
    "t",
    "transpose",
    "permute",
    "to",
    "float",
    "half",
    "bfloat16",
    "contiguous",
    "type_as",
    "unsqueeze",
    "detach",
}


def _path(node: ast.AST, me: str) -> str:
    """``a.b`` of ``self.a.b``, where ``self`` is called ``me``; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == me else ""
