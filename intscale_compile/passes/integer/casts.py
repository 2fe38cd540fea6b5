"""Integer casts: conversions between floating point types, and dropout that drops nothing, disappear.

Matches ``to``, ``float``, ``type_as`` and the like from one floating point type to another, and ``dropout`` of a model that does
not train. Marks every node that holds a floating point value, for the pass that proves that none is left.
"""

from __future__ import annotations

import torch
from torch import fx

from ...errors import IntegerOnlyError
from ..base import GraphRewrite, Pass, example
from ..match import argument
from .nodes import WAS_FLOAT, is_float, name_of

CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "type"}


def integer_casts(rewrite: GraphRewrite) -> int:
    """Remove every such node; returns how many.

    Raises:
        IntegerOnlyError: under autocast.
    """
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise IntegerOnlyError(
            "integer-only: autocast is on, and such a model has one type: call it outside of autocast.", ("autocast",)
        )
    done = 0
    for node in list(rewrite.graph.nodes):
        if is_float(example(node)):
            node.meta[WAS_FLOAT] = True
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            rewrite.graph.erase_node(node)
            done += 1
    return done


INTEGER_CASTS = Pass("integer_casts", integer_casts)


def _is_identity(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_float(example(node)) or not is_float(example(source)):
        return False
    name = name_of(node)
    if name in ("dropout", "feature_dropout"):
        training = argument(node, 2, "training", "train")
        return training is False or argument(node, 1, "p") in (0, 0.0)
    moved = name in CASTS and example(node).device != example(source).device
    return name in CASTS and not moved
