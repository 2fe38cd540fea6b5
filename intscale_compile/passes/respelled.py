"""Other functions that compute a linear layer: ``inner``, ``tensordot`` and ``einsum`` (``tensors.product_forms`` says when)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from ..tensors.product_forms import einsum_linear, tensordot_linear
from .base import argument, example


def respelled(node: fx.Node, name: str) -> Iterator[tuple[Any, Any, bool]]:
    """Activation, weight and whether it is kept as ``[N, K]``, for each operand of a node that may be the weight.

    Args:
        name: of the function or method that the node calls.
    """
    if name in ("inner", "tensordot"):
        x, weight = argument(node, 0, "input", "a"), argument(node, 1, "other", "b")
        value = example(x)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return
        kept_nk = True if name == "inner" else tensordot_linear(_dims(node), value.dim())
        if kept_nk is not None:
            yield x, weight, kept_nk
    elif name == "einsum" and node.args:
        equation, *operands = node.args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        for place, weight in enumerate(operands if len(operands) == 2 else ()):
            kept_nk = einsum_linear(equation, place)
            if kept_nk is not None:
                yield operands[1 - place], weight, kept_nk


def _dims(node: fx.Node) -> Any:
    """The dimensions of a tensordot: torch takes them as one argument, aten as two."""
    of_x, of_weight = argument(node, 2, "dims", "dims_self"), argument(node, 3, "dims_other")
    return of_x if of_weight is None else (of_x, of_weight)
