"""Decode attention: one new token per sequence attends to its cache without copying it.

    scaled_dot_product_attention(q [B, H, 1, D], repeat(k [B, KH, L, D]), repeat(v), mask)
    =>  decode_attention(q, k, v, mask)

Matches calls with one query token, no dropout and no causal flag, whose keys and values are the cache itself or the cache
repeated for the query heads that share it (``x[:, :, None].expand(...).reshape(...)`` as in transformers, or
``repeat_interleave``). Left alone: CPU tensors (unless ``intscale.force_passes`` names this pass), calls that
autograd watches, operands that the kernel does not support, results whose strides may be looked at and are not those of a new
tensor (:mod:`..layout`). The repeated copies die with their last reader.
"""

from __future__ import annotations

import operator
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ...kernels.decode_attention import OP, unsupported
from ...ops import KERNEL_ABI
from ..base import GraphRewrite, Pass, example
from ..layout import take, values_if_contiguous

ATTENTION = {torch.nn.functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def decode_attention(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        operands = _operands(rewrite, node) if node.target in ATTENTION else None
        values = None if operands is None else values_if_contiguous(rewrite, node)
        if operands is not None and values is not None:
            take(rewrite, node, values)
            _replace(rewrite, node, *operands)
            done += 1
    return done


DECODE_ATTENTION = Pass("decode_attention", decode_attention)


def _operands(rewrite: GraphRewrite, node: fx.Node) -> Optional[tuple]:
    """``(q, k, v, mask, scale)`` of a call that can be replaced, with the caches before they were repeated."""
    given = dict(zip(ARGUMENTS, node.args)) | dict(node.kwargs)
    q, mask = given["query"], given.get("attn_mask")
    if given.get("dropout_p") or given.get("is_causal"):
        return None
    k, v = before_repeat(given["key"]), before_repeat(given["value"])
    values: list[Any] = [example(x) for x in (q, k, v)]
    mask_value = None if mask is None else example(mask)
    if not all(isinstance(x, Tensor) for x in values) or not isinstance(mask_value, (Tensor, type(None))):
        return None
    if values[0].device.type != "cuda" and "decode_attention" not in rewrite.settings.force_passes:
        return None
    if any(x.requires_grad for x in values) or unsupported(values[0], values[1], values[2], mask_value):
        return None
    scale = given.get("scale")
    return q, k, v, mask, float(values[0].shape[-1]) ** -0.5 if scale is None else scale


def before_repeat(node: Any) -> Any:
    """The cache behind ``node``, if that only repeats each of its heads; else ``node``."""
    value = example(node)
    if _name(node) == "repeat_interleave":
        source = node.args[0]
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
        known = isinstance(source, fx.Node) and isinstance(value, Tensor) and value.dim() == 4 and dim in (1, -3)
        repeats = node.kwargs.get("repeats", node.args[1] if len(node.args) > 1 else None)
        return source if known and isinstance(repeats, int) else node
    if _name(node) not in ("reshape", "view") or not isinstance(node.args[0], fx.Node):
        return node
    expand = node.args[0]
    insert = expand.args[0] if _name(expand) == "expand" else None
    if not isinstance(insert, fx.Node) or not _inserts_dimension_2(insert):
        return node
    cache = insert.args[0]
    shapes = [example(n).shape for n in (cache, expand, node)]
    batch, heads, keys, features = shapes[0] if len(shapes[0]) == 4 else (None,) * 4
    if len(shapes[1]) != 5 or tuple(shapes[1][:2]) != (batch, heads) or tuple(shapes[1][3:]) != (keys, features):
        return node
    return cache if tuple(shapes[2]) == (batch, heads * shapes[1][2], keys, features) else node


def _inserts_dimension_2(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        index, whole = node.args[1], slice(None, None, None)
        return isinstance(node.args[0], fx.Node) and index in ((whole, whole, None), (whole, whole, None, whole, whole))
    return _name(node) == "unsqueeze" and node.args[1:] == (2,)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _replace(rewrite: GraphRewrite, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, mask, scale: float) -> None:
    with rewrite.graph.inserting_before(node):
        y = rewrite.call(OP, (q, k, v, mask, scale, KERNEL_ABI, True), like=node)
    repeated = {n for n in node.all_input_nodes if n not in (q, k, v, mask)}
    node.replace_all_uses_with(y)
    rewrite.graph.erase_node(node)
    for dead in repeated:
        erase_chain(rewrite, dead)


def erase_chain(rewrite: GraphRewrite, node: fx.Node) -> None:
    """Erase a repeat that nothing reads any more, with the views that it was made of."""
    while not node.users and _name(node) in {"reshape", "view", "expand", "getitem", "unsqueeze", "repeat_interleave"}:
        source = node.args[0]
        rewrite.graph.erase_node(node)
        if not isinstance(source, fx.Node):
            return
        node = source
