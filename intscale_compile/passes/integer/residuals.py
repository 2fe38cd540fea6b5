"""Integer residuals: the sum of two Q16 values is ``int_add``, which saturates.

    a + b  =>  int_add(a, b)

Matches sums of two floating point tensors that the graph computes, or one of them and a constant is left alone.
"""

from __future__ import annotations

from typing import Any, Optional

from torch import fx

from ...kernels.integer.pointwise import ADD_OP
from ..base import GraphRewrite, Pass, example
from .nodes import binary, erase_unread, is_float
from .parts import source_of


def integer_residuals(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        terms = _terms(rewrite, node)
        if terms is not None:
            with rewrite.graph.inserting_before(node):
                made = rewrite.call(ADD_OP, terms, like=node, value=example(node))
            node.replace_all_uses_with(made)
            erase_unread(node)
            done += 1
    return done


INTEGER_RESIDUALS = Pass("integer_residuals", integer_residuals)


def _terms(rewrite: GraphRewrite, node: fx.Node) -> Optional[tuple[Any, Any]]:
    terms = binary(node, "add") or binary(node, "iadd")
    if terms is None or not is_float(example(node)):
        return None
    tensors = all(isinstance(term, fx.Node) and hasattr(example(term), "shape") for term in terms)
    constant = any(source_of(rewrite, term) is not None for term in terms)
    return terms if tensors and not constant else None
