"""Output rows of a weight: ``weight[a:b]``, ``narrow``, and one of the parts of ``split`` or ``chunk``.

A quantized row has a scale of its own, so rows of a quantized weight are the quantized rows: one packed copy serves every
product with a part of it. A part along the input features is no such thing and stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, Optional

from torch import Tensor, fx

from .base import example

PARTED = {"split", "chunk", "tensor_split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "vsplit", "hsplit"}
DIM_OF = {"vsplit": 0, "hsplit": 1}


class Cut(NamedTuple):
    """Entries ``start`` to ``end`` of dimension ``dim`` of the matrix ``node``, one after another."""

    node: fx.Node
    dim: int
    start: int
    end: int


def cut_of(node: fx.Node, name: str) -> Optional[Cut]:
    """The part of a matrix that a node, which calls ``name``, takes; None where it does something else."""
    if name == "narrow":
        values = [node.args[i] if i < len(node.args) else node.kwargs.get(n) for i, n in enumerate(NARROW)]
        return _cut(values[0], values[1], values[2], values[3], by_length=True)
    if name == "slice":
        return _aten_slice(node)
    if node.target is not operator.getitem and name != "__getitem__":
        return None
    whole, index = node.args[:2]
    if isinstance(example(whole), (tuple, list)):
        return _part(whole, index)
    if not _is_matrix(whole):
        return None
    kept = [i for i in (index if isinstance(index, tuple) else (index,))]
    if Ellipsis in kept:
        place = kept.index(Ellipsis)
        kept[place : place + 1] = [slice(None)] * (3 - len(kept))
    ranges = [_bounds(i, size) for i, size in zip(kept, example(whole).shape)]
    if len(kept) > 2 or None in ranges:
        return None
    parts = [(dim, r) for dim, (r, size) in enumerate(zip(ranges, example(whole).shape)) if r != (0, size)]
    if len(parts) > 1:
        return None
    dim, bounds = parts[0] if parts else (0, (0, example(whole).shape[0]))
    return _cut(whole, dim, *bounds)  # type: ignore[misc]


def _aten_slice(node: fx.Node) -> Optional[Cut]:
    """The part that ``aten.slice`` takes, whose ends may lie outside."""
    values = [
        node.args[i] if i < len(node.args) else node.kwargs.get(n, default) for i, (n, default) in enumerate(SLICE)
    ]
    whole, dim, start, end, step = values
    if not _is_matrix(whole) or not isinstance(dim, int):
        return None
    bounds = _bounds(slice(start, end, step), example(whole).shape[dim])
    return None if bounds is None else _cut(whole, dim, *bounds)


SLICE = (("self", None), ("dim", 0), ("start", None), ("end", None), ("step", 1))
NARROW = ("input", "dim", "start", "length")


def _bounds(index: Any, size: int) -> Optional[tuple[int, int]]:
    """First and last entry of a slice without steps; None for any other index."""
    if not isinstance(index, slice) or any(not isinstance(p, (int, type(None))) for p in _parts_of(index)):
        return None
    start, end, step = index.indices(size)
    return (start, end) if step == 1 and start < end else None


def _parts_of(index: slice) -> tuple:
    return index.start, index.stop, index.step


def _part(parts: Any, index: Any) -> Optional[Cut]:
    """An entry of what ``split`` and the like return."""
    name = str(parts.target) if parts.op == "call_method" else getattr(parts.target, "__name__", "").split(".")[0]
    sizes = example(parts)
    whole = parts.args[0] if parts.args else None
    if (
        name not in PARTED
        or not isinstance(index, int)
        or not -len(sizes) <= index < len(sizes)
        or not _is_matrix(whole)
    ):
        return None
    dim = DIM_OF.get(name, parts.args[2] if len(parts.args) > 2 else parts.kwargs.get("dim", 0))
    if not isinstance(dim, int):
        return None
    start = sum(part.shape[dim] for part in sizes[: index % len(sizes)])
    return _cut(whole, dim, start, start + sizes[index].shape[dim])


def _is_matrix(node: Any) -> bool:
    value = example(node) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 2


def _cut(whole: Any, dim: Any, start: Any, end: Any, by_length: bool = False) -> Optional[Cut]:
    if not _is_matrix(whole) or not all(isinstance(i, int) for i in (dim, start, end)):
        return None
    start = start % example(whole).shape[dim] if start < 0 else start
    end = start + end if by_length else end
    return Cut(whole, dim % 2, start, end) if 0 <= start < end <= example(whole).shape[dim] else None
