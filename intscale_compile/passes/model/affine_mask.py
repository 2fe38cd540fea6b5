"""Proof that a mask is causal whatever the sizes are: positions are followed through the graph as affine functions.

An integer tensor is ``c + sum(a[d] * i[d])`` of its own indices ``i``, a mask is a set of such functions that must all be
at most 0. The causal mask of transformers ends as ``k - q <= 0`` and some conditions that hold everywhere (its search for
packed sequences finds position differences of 1). Every rule holds for all sizes; what has no rule is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..base import example
from .constant_mask import function_name

INTEGERS = (torch.int64, torch.int32)
WHOLE = slice(None, None, None)


@dataclass(frozen=True)
class Affine:
    """``constant + sum(slopes[d] * i[d])``; a dimension of size 1 has slope 0, so broadcasting changes nothing."""

    slopes: tuple[int, ...]
    constant: int = 0

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        """``self + factor * other``, broadcast."""
        rank = max(len(self.slopes), len(other.slopes))
        slopes = zip(self.of_rank(rank).slopes, other.of_rank(rank).slopes)
        return Affine(tuple(a + factor * b for a, b in slopes), self.constant + factor * other.constant)

    def of_rank(self, rank: int) -> Affine:
        """The same function with leading dimensions added."""
        return Affine((0,) * (rank - len(self.slopes)) + self.slopes, self.constant)

    @property
    def is_constant(self) -> bool:
        """Whether it has one value everywhere."""
        return not any(self.slopes)


Conditions = frozenset[Affine]  # a mask: True where each is at most 0
Value = Union[Affine, Conditions, None]
NEVER = frozenset({Affine((), 1)})


def is_causal(mask: fx.Node) -> bool:
    """Whether ``mask`` is True exactly where the index of its last dimension is at most that of the one before it."""
    return Positions().of(mask) == frozenset({_causal(mask)})


def _causal(mask: fx.Node) -> Affine:
    value = example(mask)
    rank = value.dim() if isinstance(value, Tensor) else 0
    return Affine((0,) * (rank - 2) + (-1, 1)) if rank >= 2 else Affine(())


class Positions:
    """The affine functions of one graph's nodes."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Value] = {}

    def of(self, node: Any) -> Value:
        """What a node (or a number) holds, or None."""
        if isinstance(node, int) and not isinstance(node, bool):
            return Affine((), node)
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            rule = _RULES.get(function_name(node) or "")
            value = example(node)
            result = rule(self, node) if rule is not None and isinstance(value, Tensor) else None
            self._known[node] = _in_dimensions(result, value) if result is not None else None
        return self._known[node]

    def affine(self, node: Any) -> Optional[Affine]:
        """What a node holds, where that is an affine function."""
        value = self.of(node)
        return value if isinstance(value, Affine) else None


Rule = Callable[[Positions, fx.Node], Value]


def _in_dimensions(value: Value, tensor: Tensor) -> Value:
    """``value`` with the rank of ``tensor`` and slope 0 where it has size 1; None if it cannot be this tensor's."""
    single = [statically_known_true(size == 1) for size in tensor.shape]

    def fit(function: Affine) -> Affine:
        slopes = function.of_rank(len(single)).slopes
        return Affine(tuple(0 if one else slope for one, slope in zip(single, slopes)), function.constant)

    functions = [value] if isinstance(value, Affine) else list(value or ())
    if any(len(function.slopes) > len(single) for function in functions):
        return None
    if isinstance(value, Affine):
        return fit(value) if tensor.dtype in INTEGERS else None
    if value is None or tensor.dtype is not torch.bool:
        return None
    open_conditions = frozenset(c for c in map(fit, value) if not (c.is_constant and c.constant <= 0))
    return NEVER if any(c.is_constant for c in open_conditions) else open_conditions


def _arange(_: Positions, node: fx.Node) -> Value:
    start = 0 if len(node.args) == 1 else node.args[0]
    plain = len(node.args) in (1, 2) and set(node.kwargs) <= {"device", "dtype"}
    return Affine((1,), start) if plain and isinstance(start, int) else None


def _ones(_: Positions, node: fx.Node) -> Value:
    return frozenset()  # of dtype bool, or else dropped by _in_dimensions


def _difference(positions: Positions, node: fx.Node, factor: int = -1) -> Optional[Affine]:
    """``a + factor * b`` of a function of two position tensors or numbers."""
    if len(node.args) != 2 or node.kwargs:
        return None
    a, b = (positions.affine(x) for x in node.args)
    return None if a is None or b is None else a.plus(b, factor)


def _sum(factor: int) -> Rule:
    return lambda positions, node: _difference(positions, node, factor)


def _compared(sign: int, more: int) -> Rule:
    """``sign * (a - b) + more <= 0``."""

    def rule(positions: Positions, node: fx.Node) -> Value:
        difference = _difference(positions, node)
        return None if difference is None else frozenset({Affine((), more).plus(difference, sign)})

    return rule


def _equal(wanted: bool) -> Rule:
    """Equality that is the same everywhere."""

    def rule(positions: Positions, node: fx.Node) -> Value:
        difference = _difference(positions, node)
        if difference is None or not difference.is_constant:
            return None
        return frozenset() if (difference.constant == 0) is wanted else NEVER

    return rule


def _and(positions: Positions, node: fx.Node) -> Value:
    a, b = (positions.of(node.args[i]) if len(node.args) == 2 else None for i in (0, 1))
    return a | b if isinstance(a, frozenset) and isinstance(b, frozenset) else None


def _same(positions: Positions, node: fx.Node) -> Value:
    """``to`` and ``expand``; another dtype is dropped by _in_dimensions."""
    return positions.of(node.args[0])


def _unsqueeze(positions: Positions, node: fx.Node) -> Value:
    x, dim = positions.affine(node.args[0]), node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if x is None or not isinstance(dim, int):
        return None
    at = dim % (len(x.slopes) + 1)
    return Affine((*x.slopes[:at], 0, *x.slopes[at:]), x.constant)


def _getitem(positions: Positions, node: fx.Node) -> Value:
    x, index = positions.of(node.args[0]), node.args[1]
    items: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if isinstance(x, Affine):
        gathers = items and all(isinstance(item, fx.Node) for item in items)
        return _gathered(positions, x, items) if gathers else _viewed(x, items)
    conditions = [_viewed(condition, items) for condition in x or ()]
    return None if x is None or None in conditions else frozenset(c for c in conditions if c is not None)


def _viewed(x: Affine, items: list[Any]) -> Optional[Affine]:
    """``x[items]`` of whole dimensions, their beginnings, and new dimensions."""
    if Ellipsis in items:
        at = items.index(Ellipsis)
        kept = len(x.slopes) - sum(isinstance(item, slice) for item in items)
        items = [*items[:at], *[WHOLE] * kept, *items[at + 1 :]]
    slopes, rest = [], list(x.slopes)
    for item in items:
        if item is not None and not (isinstance(item, slice) and not item.start and item.step is None and rest):
            return None
        slopes.append(0 if item is None else rest.pop(0))
    return Affine((*slopes, *rest), x.constant)


def _gathered(positions: Positions, x: Affine, indices: list[fx.Node]) -> Value:
    """``x[i, j]`` of position tensors, none of them negative."""
    known = [positions.affine(index) for index in indices]
    if len(known) != len(x.slopes):
        return None
    result = Affine((), x.constant)
    for slope, index in zip(x.slopes, known):
        if index is None or index.constant < 0 or min(index.slopes, default=0) < 0:
            return None
        result = result.plus(index, slope)
    return result


def _diff(positions: Positions, node: fx.Node) -> Value:
    """Differences along the last dimension, where the element put before the first one continues them."""
    x, before = positions.affine(node.args[0]), positions.affine(node.kwargs.get("prepend"))
    last = node.kwargs.get("dim", -1) == -1 and len(node.args) == 1 and set(node.kwargs) <= {"dim", "prepend"}
    if x is None or before is None or not x.slopes or not last:
        return None
    if not statically_known_true(example(node.kwargs["prepend"]).shape[-1] == 1):
        return None
    first = Affine((*x.slopes[:-1], 0), x.constant).plus(before, -1)
    step = Affine((), x.slopes[-1])
    return step.of_rank(len(x.slopes)) if first == step.of_rank(len(first.slopes)) else None


def _cumsum(positions: Positions, node: fx.Node) -> Value:
    """The sum of a mask that is True nowhere."""
    return Affine(()) if positions.of(node.args[0]) == NEVER and len(node.args) == 2 else None


_RULES: dict[str, Rule] = {
    "arange": _arange,
    "ones": _ones,
    "new_ones": _ones,
    "add": _sum(1),
    "sub": _sum(-1),
    "le": _compared(1, 0),
    "lt": _compared(1, 1),
    "ge": _compared(-1, 0),
    "gt": _compared(-1, 1),
    "eq": _equal(True),
    "ne": _equal(False),
    "and_": _and,
    "and": _and,
    "logical_and": _and,
    "bitwise_and": _and,
    "to": _same,
    "expand": _same,
    "unsqueeze": _unsqueeze,
    "getitem": _getitem,
    "diff": _diff,
    "cumsum": _cumsum,
}
