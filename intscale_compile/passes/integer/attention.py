"""Integer attention: ``scaled_dot_product_attention`` over codes of queries, keys and values.

    scaled_dot_product_attention(q, repeat(k), repeat(v), mask)  =>  int_attention(*int_quantize(q), *int_quantize(k), ...)
    cache_quantize(k), cache_dequantize(codes, scales)           =>  int_quantize(k), the codes themselves

Matches masks of type bool and causal flags. Left alone: added masks (ALiBi, relative positions), dropout, attention that is
written out as products and a softmax.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ...kernels.integer.arithmetic import dyadic_number
from ...kernels.integer.attention import ATTENTION_OP
from ...kernels.integer.cache_form import CACHE_DEQUANTIZE_OP, CACHE_QUANTIZE_OP
from ...kernels.integer.rows import QUANTIZE_OP
from ..base import GraphRewrite, Pass, example
from ..model.decode_attention import ARGUMENTS, ATTENTION, before_repeat
from .nodes import erase_unread, number


def integer_attention(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        if node.target is CACHE_QUANTIZE_OP:
            with rewrite.graph.inserting_before(node):
                made = rewrite.call(QUANTIZE_OP, node.args, like=node)
            node.replace_all_uses_with(made)
            rewrite.graph.erase_node(node)
        elif node.target in ATTENTION:
            done += _attention(rewrite, node)
    return done


INTEGER_ATTENTION = Pass("integer_attention", integer_attention)


def _attention(rewrite: GraphRewrite, node: fx.Node) -> bool:
    given = dict(zip(ARGUMENTS, node.args)) | dict(node.kwargs)
    mask, query = given.get("attn_mask"), example(given["query"])
    mask_value = None if mask is None else example(mask)
    if mask is not None and not (isinstance(mask_value, Tensor) and mask_value.dtype is torch.bool):
        return False
    dropout = number(given.get("dropout_p", 0.0))
    scale: Optional[float] = float(query.shape[-1]) ** -0.5
    if given.get("scale") is not None:
        scale = number(given["scale"])
    if dropout or scale is None or scale <= 0 or query.dim() != 4:
        return False
    c_m, c_k = dyadic_number(scale * math.log2(math.e))
    with rewrite.graph.inserting_before(node):
        operands = [_codes(rewrite, given[name], node) for name in ("query", "key", "value")]
        flat = [part for pair in operands for part in pair]
        made = rewrite.call(ATTENTION_OP, (*flat, mask, bool(given.get("is_causal")), c_m, c_k), like=node)
    node.replace_all_uses_with(made)
    erase_unread(node)
    return True


def _codes(rewrite: GraphRewrite, x: Any, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    x = before_repeat(x)
    if x.target is CACHE_DEQUANTIZE_OP:
        return x.args[0], x.args[1]
    quantized = rewrite.call(QUANTIZE_OP, (x,), like=like)
    codes, scale = (rewrite.item(quantized, i, like) for i in (0, 1))
    return codes, scale
