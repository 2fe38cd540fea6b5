"""Share: one activation quantization per activation, not one per consumer.

Matches ``hadamard`` and quantize nodes of one value (and the nodes that only unpack or dequantize them) and keeps the first.
Static quantizations are shared where the scales are equal; the weights then get one tensor for them (``ActivationScale``).
Left apart: nodes between which the activation is written in place, transforms of different sizes, different scales.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from typing import Optional

import torch
from torch import Tensor, fx

from ..ops import dequantize, hadamard, quantize_per_token, quantize_static
from ..packed_weights import ActivationScale
from ..reasons import log_once
from .base import GraphRewrite, Pass, example, writes_in_place

QUANTIZERS = (quantize_per_token.OP, quantize_static.STATIC_OP)
OF_ACTIVATIONS = (hadamard.HADAMARD_OP, *QUANTIZERS)


def share_quantize(rewrite: GraphRewrite) -> int:
    """Remove repeated quantizations, and the transforms before them; returns how many quantizations."""
    shared = 0
    kept: dict[tuple, list[fx.Node]] = defaultdict(list)
    unpacked: dict[tuple, fx.Node] = {}
    for node in list(rewrite.graph.nodes):
        if node.target in OF_ACTIVATIONS:
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
    if first.args != node.args:
        first.update_arg(1, _joined_scale(rewrite, first, node))
    node.replace_all_uses_with(first)
    rewrite.graph.erase_node(node)


def _of_quantize(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and node.args[0].target in QUANTIZERS


def _is_same(rewrite: GraphRewrite, first: fx.Node, node: fx.Node) -> bool:
    """Whether two nodes of one activation give the same, whatever else the graph does."""
    same = first.args == node.args or (node.target is quantize_static.STATIC_OP and _equal_scales(rewrite, first, node))
    return same and not written_between(first, node)


def _scale_recipe(rewrite: GraphRewrite, node: fx.Node) -> Optional[ActivationScale]:
    """Where the scale of a static quantization comes from; None where the graph computes it."""
    recipe, _ = rewrite.packed_inputs.get(node.args[1], (None, None))  # type: ignore[arg-type]
    return recipe if isinstance(recipe, ActivationScale) else None


def _equal_scales(rewrite: GraphRewrite, first: fx.Node, node: fx.Node) -> bool:
    ours, theirs = _scale_recipe(rewrite, first), _scale_recipe(rewrite, node)
    if ours is None or theirs is None:
        return False
    scales = [recipe.resolve(rewrite.example_inputs).act_pre_scale for recipe in (ours, theirs)]
    equal = torch.equal(*scales)  # type: ignore[arg-type]
    if not equal:
        names = f"{ours.sources[0].name} and {theirs.sources[0].name}"
        log_once(logging.INFO, f"{names} read one activation with different static scales, and are not merged.")
    return equal


def _joined_scale(rewrite: GraphRewrite, first: fx.Node, node: fx.Node) -> fx.Node:
    """One graph input for the equal scales of two static quantizations."""
    ours, theirs = _scale_recipe(rewrite, first), _scale_recipe(rewrite, node)
    assert ours is not None and theirs is not None
    joined = ActivationScale((*ours.sources, *theirs.sources))
    scale = joined.resolve(rewrite.example_inputs).act_pre_scale
    return rewrite.add_packed_input(joined, "act_pre_scale", scale)  # type: ignore[arg-type]


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
