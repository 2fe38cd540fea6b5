"""Share: one activation quantization per activation, not one per consumer.

Matches ``quantize_per_token`` nodes of one value (and the nodes that only unpack or dequantize them) and keeps the first.
Left apart: nodes between which the activation is written in place.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from ..ops import dequantize, quantize_per_token
from .base import GraphRewrite, Pass, example, writes_in_place


def share_quantize(rewrite: GraphRewrite) -> int:
    """Remove repeated quantizations; returns how many."""
    shared = 0
    first: dict[tuple, fx.Node] = {}
    for node in list(rewrite.graph.nodes):
        if node.target is quantize_per_token.OP:
            key = (node.target, node.args)
            kept = first.get(key)
            if kept is not None and not written_between(kept, node):
                node.replace_all_uses_with(kept)
                rewrite.graph.erase_node(node)
                shared += 1
            else:
                first[key] = node
        elif node.target is dequantize.TOKEN_OP or (node.target is operator.getitem and _of_quantize(node)):
            kept = first.setdefault((node.target, node.args), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                rewrite.graph.erase_node(node)
    return shared


SHARE_QUANTIZE = Pass("share_quantize", share_quantize)


def _of_quantize(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and node.args[0].target is quantize_per_token.OP


def _storage(node: object):
    value = example(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def written_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether a node between the two may write in place into what both quantize."""
    storage, node = _storage(first.args[0]), first.next
    while node is not last:
        if writes_in_place(node):
            targets = [_storage(n) for n in node.all_input_nodes]
            if storage is None or None in targets or storage in targets:
                return True
        node = node.next
    return False
