"""Expressions in the trees of :mod:`.source_trees`: what they call, and which weight of the module they stand for."""

from __future__ import annotations

import ast
from typing import NamedTuple

ME = "<module>"  # no name of a program
SWAPS = {"t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"}
REARRANGE = SWAPS | {
    "to", "float", "half", "bfloat16", "contiguous", "type", "type_as", "unsqueeze", "detach", "clone", "_to_copy",
}  # fmt: skip
ATTRIBUTES = ("T", "mT", "H", "mH", "data")


def path_of(node: ast.AST, through_entries: bool = False) -> str:
    """``a.b`` of ``ME.a.b``; empty for anything else. An entry of a list of modules is its number or ``*``: ``a.*.weight``.

    Args:
        node: an expression of a tree.
        through_entries: whether the expression may end in an entry itself.
    """
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        elif isinstance(node, ast.Subscript) and (parts or through_entries):
            index = node.slice.value if isinstance(node.slice, ast.Constant) else "*"
            is_named = isinstance(index, str) or (isinstance(index, int) and index >= 0)
            parts.append(str(index) if is_named else "*")
        else:
            break
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == ME else ""


def is_weight(path: str) -> bool:
    """Whether a path is that of a weight: of a child, or the module's own."""
    return path == "weight" or path.endswith(".weight")


def called(call: ast.Call) -> str:
    """Last part of the name of the function that is called: ``index_select`` of ``aten.index_select.default`` too."""
    func = call.func
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Attribute) and of_torch(func):
        above = func.value.value
        if (above.attr if isinstance(above, ast.Attribute) else getattr(above, "id", "")) == "aten":
            return func.value.attr.removeprefix("linalg_")
    name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    return name.removeprefix("linalg_")


def of_torch(func: ast.AST) -> bool:
    """Whether a function is written as one of torch: ``torch.norm``, ``F.normalize``, ``torch.nn.functional.normalize``."""
    while isinstance(func, ast.Attribute):
        func = func.value
    return isinstance(func, ast.Name) and func.id in ("torch", "F", "nn", "functional", "aten")


class Rearranged(NamedTuple):
    """A value without transposes, casts and choices of entries around it.

    Attributes:
        inner: the value.
        transposed: whether an odd number of transposes is around it.
        stacked: whether it got a dimension more: ``weight.t()[None]``, ``weight.unsqueeze(0)``.
        cut: whether entries of it are chosen.
    """

    inner: ast.AST
    transposed: bool
    stacked: bool
    cut: bool


def rearranged(node: ast.AST) -> Rearranged:
    """What is around a value."""
    transposed = stacked = cut = False
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and called(node) in REARRANGE:
            transposed ^= called(node) in SWAPS
            stacked |= called(node) == "unsqueeze"
            node = node.args[0] if of_torch(node.func) and node.args else node.func.value
        elif isinstance(node, ast.Subscript):
            entries = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            stacked |= any(isinstance(entry, ast.Constant) and entry.value is None for entry in entries)
            cut, node = True, node.value
        elif isinstance(node, ast.NamedExpr):
            node = node.value
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            transposed ^= node.attr != "data"
            node = node.value
        else:
            return Rearranged(node, transposed, stacked, cut)


def bare(node: ast.AST) -> ast.AST:
    """A value without transposes, casts and choices of entries around it."""
    return rearranged(node).inner
