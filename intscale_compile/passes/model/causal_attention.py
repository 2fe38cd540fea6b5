"""Causal attention: a mask that hides just the future becomes a flag, and grouped heads are not copied.

    scaled_dot_product_attention(q [B, H, Q, D], repeat(k [B, KH, Q, D]), repeat(v), attn_mask=tril)
    =>  scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

Matches calls with more than one query token and no causal flag, whose mask is known while the graph compiles: it hides
the future and nothing else (for any size: :mod:`.affine_mask`, or for static ones: :mod:`.constant_mask`), or it hides
nothing. Where no mask is left and the GPU's flash attention can run the call, keys and values that were only repeated for
the query heads which share them are taken as they were before. Left alone: masks that the caller passes or that depend on
a cache, windows shorter than the sequence, prefixes, causal masks that are not square, keys and values on a CPU.
Where the caller promises a whole prompt (setting ``whole_prompt``), a bool mask over a longer cache hides the future too,
and keys and values are cut to the length of the prompt. With a mask PyTorch has no flash attention. The nodes of a mask die
with their last reader, as do the repeated copies.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..base import EXAMPLE, GraphRewrite, Pass, example
from ..layout import computed, same_layout, take, values_with
from .affine_mask import is_causal
from .constant_mask import ConstantMasks, erase_unread, history, untouched
from .decode_attention import ARGUMENTS, ATTENTION, before_repeat, erase_chain

FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM = 256


def causal_attention(rewrite: GraphRewrite) -> int:
    """Simplify every match; returns how many."""
    masks, done = ConstantMasks(rewrite), 0
    for node in list(rewrite.graph.nodes):
        if node.target in ATTENTION and _several_queries(node):
            promised = _drop_promised_mask(rewrite, node)
            unmasked = promised or _drop_mask(rewrite, masks, node)
            done += _drop_repeat(rewrite, node) or unmasked
            if promised:
                _cut_keys(rewrite, node)
    return done


CAUSAL_ATTENTION = Pass("causal_attention", causal_attention)


def _given(node: fx.Node) -> dict[str, Any]:
    return dict(zip(ARGUMENTS, node.args)) | dict(node.kwargs)


def _several_queries(node: fx.Node) -> bool:
    q = example(_given(node)["query"])
    return isinstance(q, Tensor) and q.dim() == 4 and not statically_known_true(q.shape[2] == 1)


def _drop_mask(rewrite: GraphRewrite, masks: ConstantMasks, node: fx.Node) -> bool:
    """Replace the mask by a flag if it is known; whether it was."""
    given = _given(node)
    mask = given.get("attn_mask")
    if not isinstance(mask, fx.Node) or given.get("is_causal"):
        return False
    kind = "causal" if _proved_causal(rewrite, mask, node) else masks.kind(mask)
    if kind is None:
        return False
    if not _set(rewrite, node, attn_mask=None, is_causal=kind == "causal"):
        return False
    erase_unread(mask)
    return True


def _drop_promised_mask(rewrite: GraphRewrite, node: fx.Node) -> bool:
    """Replace the mask of a whole prompt by a flag; whether there was one."""
    given = _given(node)
    mask = given.get("attn_mask")
    if not rewrite.settings.whole_prompt or given.get("is_causal") or not isinstance(mask, fx.Node):
        return False
    value = example(mask)
    if not isinstance(value, Tensor) or value.dtype is not torch.bool:  # an added one may hold more, such as ALiBi
        return False
    _set(rewrite, node, attn_mask=None, is_causal=True)
    erase_unread(mask)
    return True


def _cut_keys(rewrite: GraphRewrite, node: fx.Node) -> None:
    """Let the attention of a whole prompt read as many keys and values as there are queries: what comes behind is empty."""
    given = _given(node)
    tokens: Any = example(given["query"]).shape[2]
    graph, cut = rewrite.graph, {}
    with graph.inserting_before(node):
        if not isinstance(tokens, int):
            tokens = graph.call_method("size", (given["query"], 2))
            rewrite.set_example(tokens)
        for name in ("key", "value"):
            cut[name] = graph.call_function(torch.narrow, (given[name], 2, 0, tokens))
            rewrite.set_example(cut[name])
    _set(rewrite, node, **cut)


def _proved_causal(rewrite: GraphRewrite, mask: fx.Node, node: fx.Node) -> bool:
    sizes = [example(_given(node)[name]).shape[2] for name in ("query", "key")]
    square = statically_known_true(sizes[0] == sizes[1])
    value = example(mask)
    return (
        square
        and isinstance(value, Tensor)
        and value.dim() >= 2
        and all(statically_known_true(size == sizes[0]) for size in value.shape[-2:])
        and is_causal(mask)
        and untouched(rewrite.graph, history(mask))
    )


def _drop_repeat(rewrite: GraphRewrite, node: fx.Node) -> bool:
    """Let the attention without mask read keys and values before they were repeated; whether they were."""
    given = _given(node)
    if given.get("attn_mask") is not None:
        return False
    repeated = [given["key"], given["value"]]
    k, v = (before_repeat(x) for x in repeated)
    values = [example(x) for x in (given["query"], k, v)]
    if [k, v] == repeated or not all(isinstance(x, Tensor) and _flash_can_read(x) for x in values):
        return False
    if values[1].shape[:3] != values[2].shape[:3]:
        return False
    if not _set(rewrite, node, key=k, value=v, enable_gqa=True):
        return False
    for copy in repeated:
        erase_chain(rewrite, copy)
    return True


def _flash_can_read(x: Tensor) -> bool:
    """Elsewhere PyTorch has no attention that shares heads, other than one which writes all scores to memory."""
    nvidia = x.device.type == "cuda" and torch.version.hip is None
    return (
        nvidia
        and x.dtype in FLASH_DTYPES
        and x.shape[-1] <= FLASH_HEAD_DIM
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _set(rewrite: GraphRewrite, node: fx.Node, **changed: Any) -> bool:
    """Give a call other arguments, in the place or under the name where they are.

    False, and nothing is changed, where the result would have other strides and a reader may look at them.
    """
    before = node.args, node.kwargs
    args = list(node.args)
    for name, value in changed.items():
        position: Optional[int] = ARGUMENTS.index(name) if name in ARGUMENTS else None
        if position is not None and position < len(args):
            args[position] = value
        else:
            node.kwargs = {**node.kwargs, name: value}
    node.args = tuple(args)
    old = example(node)
    if isinstance(old, Tensor):
        result = computed(rewrite, node, {})
        values = {} if same_layout(old, result) else values_with(rewrite, node, result)
        if values is None:
            node.args, node.kwargs = before
            return False
        if not old.requires_grad:
            node.meta[EXAMPLE] = result
            take(rewrite, node, values)
    return True
