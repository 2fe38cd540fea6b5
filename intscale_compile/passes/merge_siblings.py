"""Merge siblings: linears that read one quantized activation become one GEMM (q/k/v, gate/up).

    y_i = linear(x, dequantize_weight(w_i), b_i)   for i in siblings
    =>  y = linear(x, dequantize_weight(concatenated w), concatenated b);  y_i = split(y)[i]

Matches two or more Q/DQ linears with the same dequantized activation and the same weight format, each with a constant
bias or without. A sibling whose readers may look at strides (:mod:`.layout`: ``as_strided``, a view that a slice does not
allow, an operator of another library, a result of the graph) gets a copy, which has the strides that it had.
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ..integrations.torch import is_static_input
from ..kernels.arguments import DequantizeWeightArguments, arguments_of
from ..ops import dequantize
from ..reasons import log_once
from .base import GraphRewrite, Pass, example, weight_recipe
from .insert_qdq import dequantized_weight
from .layout import take, values_with
from .match import LINEAR
from .packed_weights import ConcatenatedBias, Packed, WeightSource, merged


def merge_siblings(rewrite: GraphRewrite) -> int:
    """Merge every group of siblings; returns how many groups."""
    groups: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in rewrite.graph.nodes:
        key = _sibling_key(rewrite, node)
        if key is not None:
            groups[key].append(node)
    siblings = [part for group in groups.values() for part in _by_bias_dtype(group) if len(part) > 1]
    for group in siblings:
        _merge(rewrite, group)
    return len(siblings)


MERGE_SIBLINGS = Pass("merge_siblings", merge_siblings)


def _sibling_key(rewrite: GraphRewrite, node: fx.Node) -> Optional[tuple]:
    if node.target not in LINEAR or "intscale_candidates" not in node.meta:
        return None
    x, weight, bias = node.args
    if weight.target is not dequantize.WEIGHT_OP:  # type: ignore[union-attr]
        return None
    if bias is not None and _bias_source(rewrite, bias, node) is None:
        return None
    tensor = weight.meta["intscale_tensor"]  # type: ignore[union-attr]
    # The integer range is part of the format: merging a narrow one into a wide one would take its fold schedule away.
    return (
        x,
        tensor.in_features,
        tensor.group_size,
        tensor.weight_bits,
        tensor.scale_bits,
        tensor.packing_format,
        tensor.scale.dtype,
        weight_recipe(weight).config == rewrite.settings.config,  # type: ignore[arg-type]
        _stored(node).dtype,
        node.meta["intscale_grad"],
    )


def _stored(node: fx.Node) -> DequantizeWeightArguments:
    """The arguments of the ``dequantize_weight`` node that a linear in Q/DQ form reads."""
    return arguments_of(DequantizeWeightArguments, node.args[1])  # type: ignore[arg-type]


def _by_bias_dtype(group: list[fx.Node]) -> Iterable[list[fx.Node]]:
    """Split siblings by the dtype of their bias; those without one (Whisper's keys) join the first that has one."""
    dtypes = [example(node.args[2]).dtype for node in group if node.args[2] is not None]
    parts: dict[Optional[torch.dtype], list[fx.Node]] = defaultdict(list)
    for node in group:
        bias = node.args[2]
        parts[example(bias).dtype if bias is not None else next(iter(dtypes), None)].append(node)
    return parts.values()


def _bias_source(rewrite: GraphRewrite, bias: object, node: fx.Node) -> Optional[WeightSource]:
    """Where a constant bias comes from; None where joining it would hide it from autograd or where it is computed."""
    if not isinstance(bias, fx.Node) or bias not in rewrite.input_index:
        return None
    index = rewrite.input_index[bias]
    value = rewrite.example_inputs[index]
    constant = isinstance(value, torch.nn.Parameter) or is_static_input(bias)
    trains = isinstance(value, Tensor) and value.requires_grad and node.meta["intscale_grad"]
    return WeightSource(bias.name, index) if constant and not trains else None


def _merge(rewrite: GraphRewrite, group: list[fx.Node]) -> None:
    first = group[0]
    x, dtype = first.args[0], _stored(first).dtype
    recipe: Packed = merged([weight_recipe(node.args[1]) for node in group])  # type: ignore[arg-type]
    packed = recipe.resolve(rewrite.example_inputs)
    sizes: list[Any] = [_stored(node).out_features for node in group]
    with rewrite.graph.inserting_before(first):
        bias = _joined_bias(rewrite, group, sizes)
        weight = dequantized_weight(rewrite, recipe, packed, dtype, first)
        y = rewrite.call(torch.nn.functional.linear, (x, weight, bias), like=first)
        pieces = rewrite.call(torch.split, (y, sizes), {"dim": -1}, like=first)
    candidates = [c for node in group for c in node.meta["intscale_candidates"]]
    y.meta["intscale_candidates"] = candidates
    y.meta["intscale_grad"] = first.meta["intscale_grad"]
    for candidate in candidates:
        candidate.merged_into = " + ".join(c.name for c in candidates)
    _distribute(rewrite, group, pieces)


def _joined_bias(rewrite: GraphRewrite, group: list[fx.Node], sizes: list[int]) -> Optional[fx.Node]:
    """One input for the biases of all siblings, or None where none has one."""
    sources, first_rows = [], []
    for i, node in enumerate(group):
        source = None if node.args[2] is None else _bias_source(rewrite, node.args[2], node)
        if source is not None:
            sources.append(source)
            first_rows.append(sum(sizes[:i]))
    if not sources:
        return None
    joined = ConcatenatedBias(tuple(sources), tuple(first_rows), sum(sizes))
    return rewrite.add_packed_input(joined, None, joined.resolve(rewrite.example_inputs))


def _distribute(rewrite: GraphRewrite, group: list[fx.Node], pieces: fx.Node) -> None:
    """Give the readers of each sibling its columns: a slice where nobody looks at strides, else a copy."""
    for i, node in enumerate(group):
        with rewrite.graph.inserting_before(node if i else pieces.next):
            piece = rewrite.call(operator.getitem, (pieces, i), like=node)
            values = values_with(rewrite, node, example(piece))
            if values is None:
                piece = rewrite.call(torch.clone, (piece,), {"memory_format": torch.contiguous_format}, like=node)
                name = node.meta["intscale_candidates"][0].name
                log_once(
                    logging.INFO, f"{name}: its part of a merged product is copied, since a reader may look at strides."
                )
        take(rewrite, node, values or {})
        node.replace_all_uses_with(piece)
        rewrite.graph.erase_node(node)
