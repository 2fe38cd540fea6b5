"""Share: one activation quantization per activation, not one per consumer.

Matches ``hadamard``, gather and quantize nodes of one value (and the nodes that only unpack or dequantize them) and keeps the
first. Static quantizations are shared where the scales are equal, gathers where the input orders are; the weights then get one
tensor for them (``ActivationPart``). Left apart: nodes between which the activation is written in place, transforms of different
sizes, different scales, different orders.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from typing import Optional

from torch import Tensor, fx

from ..ops import dequantize, hadamard, quantize_per_token, quantize_static
from ..reasons import log_once
from ..tensors.activation_parts import same_part
from .base import GraphRewrite, Pass, example, writes_in_place
from .insert_qdq import GATHER, gather_order
from .packed_weights import ActivationPart

QUANTIZERS = (quantize_per_token.OP, quantize_static.STATIC_OP)
OF_ACTIVATIONS = (hadamard.HADAMARD_OP, *QUANTIZERS)
UNLIKE = {"act_pre_scale": "with different static scales", "input_order": "in different input orders"}


def share_quantize(rewrite: GraphRewrite) -> int:
    """Remove repeated quantizations, and the transforms before them; returns how many quantizations."""
    shared = 0
    kept: dict[tuple, list[fx.Node]] = defaultdict(list)
    unpacked: dict[tuple, fx.Node] = {}
    for node in list(rewrite.graph.nodes):
        if node.target in OF_ACTIVATIONS or gather_order(rewrite, node) is not None:
            before = kept[node.target, node.args[0]]
            same = next((n for n in reversed(before) if _is_same(rewrite, n, node)), None)
            if same is None:
                before.append(node)
            else:
                _keep(rewrite, same, node)
                shared += node.target in QUANTIZERS
        elif node.target is dequantize.TOKEN_OP or (node.target is operator.getitem and _of_quantize(node)):
            first = unpacked.setdefault((node.target, node.args), node)
            if first is not node:
                _keep(rewrite, first, node)
    return shared


SHARE_QUANTIZE = Pass("share_quantize", share_quantize)


def _keep(rewrite: GraphRewrite, first: fx.Node, node: fx.Node) -> None:
    """Let ``first`` stand for ``node`` too."""
    sources = [source for source in node.all_input_nodes if source not in first.all_input_nodes]
    part = _part_of_weight(rewrite, first)
    if part is not None and _part_of_weight(rewrite, node) is not part:
        reader = first.args[2] if first.target is GATHER else first
        reader.replace_input_with(part, _joined_part(rewrite, first, node))  # type: ignore[union-attr]
    node.replace_all_uses_with(first)
    rewrite.graph.erase_node(node)
    for source in sources:  # the view of another order
        if source.op != "placeholder" and not source.users:
            rewrite.graph.erase_node(source)


def _of_quantize(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and node.args[0].target in QUANTIZERS


def _is_same(rewrite: GraphRewrite, first: fx.Node, node: fx.Node) -> bool:
    """Whether two nodes of one activation give the same, whatever else the graph does."""
    return (first.args == node.args or _equal_parts(rewrite, first, node)) and not written_between(first, node)


def _part_of_weight(rewrite: GraphRewrite, node: fx.Node) -> Optional[fx.Node]:
    """The input for the scale of a static quantization or the order of a gather; None where the graph computes it."""
    order = gather_order(rewrite, node)
    if order is not None or node.target is not quantize_static.STATIC_OP:
        return order
    recipe, _ = rewrite.packed_inputs.get(node.args[1], (None, None))  # type: ignore[arg-type]
    return node.args[1] if isinstance(recipe, ActivationPart) else None  # type: ignore[return-value]


def _recipes(rewrite: GraphRewrite, first: fx.Node, node: fx.Node) -> list[ActivationPart]:
    """Where the parts that two nodes read come from; empty where the graph computes one."""
    parts = [_part_of_weight(rewrite, one) for one in (first, node)]
    return [] if None in parts else [rewrite.packed_inputs[part][0] for part in parts]  # type: ignore[index]


def _equal_parts(rewrite: GraphRewrite, first: fx.Node, node: fx.Node) -> bool:
    recipes = _recipes(rewrite, first, node)
    if not recipes:
        return False
    ours, theirs = recipes
    first_weight, weight = (recipe.resolve(rewrite.example_inputs) for recipe in recipes)
    equal = same_part(first_weight, weight, ours.part)
    if not equal:
        pair = ours.sources[0].name, theirs.sources[0].name
        rewrite.unlike.setdefault(UNLIKE[ours.part], []).append(pair)
        log_once(logging.INFO, f"{pair[0]} and {pair[1]} read one activation {UNLIKE[ours.part]}, and are not merged.")
    return equal


def _joined_part(rewrite: GraphRewrite, first: fx.Node, node: fx.Node) -> fx.Node:
    """One graph input for the equal scales of two static quantizations, or the equal orders of two gathers."""
    ours, theirs = _recipes(rewrite, first, node)
    joined = ActivationPart((*ours.sources, *theirs.sources), ours.part)
    value = getattr(joined.resolve(rewrite.example_inputs), ours.part)
    return rewrite.add_packed_input(joined, ours.part, value)


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
