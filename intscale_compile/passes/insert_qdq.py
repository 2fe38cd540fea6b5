"""Insert Q/DQ: both doors, plain weights and ``IntScaleTensor`` weights, take one readable form.

    y = linear(x, w, bias)
    =>  xq, token_scale = quantize_per_token(x)
        y = linear(dequantize_per_token(xq, token_scale), dequantize_weight(qdata, scale, row_scale), bias)

A rotated weight gets ``hadamard(x, size)`` for ``x``, one with an input order ``x.index_select(-1, order)``; one with a static
activation scale ``quantize_static(x, scale)``.

Matches the candidates without a reason. The result runs in plain PyTorch. Codes and scales become inputs of the graph,
bound to the caller's weight at each call (``packed_weights``). Quantizes plain weights now, and finds those out that cannot be.
"""

from __future__ import annotations

import logging
import operator
from typing import Optional

import torch
from torch import fx

from ..errors import OverflowProofError, WeightError
from ..ops import dequantize, hadamard, quantize_per_token, quantize_static
from ..reasons import Reason, log_once
from ..tensors.intscale_tensor import IntScaleTensor
from .base import Candidate, GraphRewrite, Pass, example
from .layout import Values, take, values_if_contiguous
from .packed_weights import ActivationPart, Packed

GATHER = torch.ops.aten.index_select.default  # of the features of an activation, by the input order of a weight


def insert_qdq(rewrite: GraphRewrite) -> int:
    """Replace every quantizable candidate; returns how many."""
    replaced: dict[fx.Node, fx.Node] = {}
    for candidate in rewrite.candidates:
        # One product may feed another directly, as its activation or its bias.
        candidate.x = replaced.get(candidate.x, candidate.x)  # type: ignore[arg-type]
        candidate.bias = replaced.get(candidate.bias, candidate.bias)  # type: ignore[arg-type]
        if candidate.reason is None and candidate.packed is None and pack(rewrite, candidate):
            values = values_if_contiguous(rewrite, candidate.node)
            if values is None:
                decline(candidate)
            else:
                replaced[candidate.node] = _replace(rewrite, candidate, values)
    return len(replaced)


INSERT_QDQ = Pass("insert_qdq", insert_qdq)


def recipe_of(candidate: Candidate, rewrite: GraphRewrite) -> Packed:
    """How the weight of a candidate is packed."""
    assert candidate.source is not None
    return Packed((candidate.source,), (candidate.transposed,), candidate.config or rewrite.settings.config)


def pack(rewrite: GraphRewrite, candidate: Candidate) -> bool:
    """Quantize the weight of a candidate; sets its reason and returns False where that is impossible."""
    try:
        candidate.packed = recipe_of(candidate, rewrite).resolve(rewrite.example_inputs)
    except OverflowProofError as error:
        candidate.reason = Reason.OVERFLOW_PROOF
        log_once(logging.WARNING, f"{candidate.name}: {error}")
    except WeightError as error:
        candidate.reason = Reason.NON_FINITE
        log_once(logging.WARNING, f"{candidate.name}: {error}")
    return candidate.packed is not None


def decline(candidate: Candidate) -> None:
    """Leave a candidate alone whose readers may look at the strides of its result."""
    candidate.packed, candidate.reason = None, Reason.STRIDES
    log_once(logging.INFO, f"{candidate.name}: {Reason.STRIDES.value}")


def _replace(rewrite: GraphRewrite, candidate: Candidate, values: Values) -> fx.Node:
    node, packed = candidate.node, candidate.packed
    assert packed is not None
    result = values.get(node, example(node))
    dtype = result.dtype if isinstance(result, torch.Tensor) else packed.dtype
    with rewrite.graph.inserting_before(node):
        x = rotated(rewrite, candidate.x, packed, node)
        if packed.input_order is not None:
            x = _gathered(rewrite, candidate)
        if packed.act_pre_scale is None:
            quantized = rewrite.call(quantize_per_token.OP, (x,), like=node)
        else:
            quantized = rewrite.call(quantize_static.STATIC_OP, (x, static_scale(rewrite, candidate)), like=node)
        xq = rewrite.call(operator.getitem, (quantized, 0), like=node)
        token_scale = rewrite.call(operator.getitem, (quantized, 1), like=node)
        x = rewrite.call(dequantize.TOKEN_OP, (xq, token_scale, dtype), like=node)
        weight = dequantized_weight(rewrite, recipe_of(candidate, rewrite), packed, dtype, node)
        y = rewrite.call(torch.nn.functional.linear, (x, weight, candidate.bias), like=node, value=result)
    y.meta["intscale_candidates"] = [candidate]
    y.meta["intscale_grad"] = node.meta.get("intscale_grad", torch.is_grad_enabled())
    take(rewrite, node, values)
    node.replace_all_uses_with(y)
    rewrite.graph.erase_node(node)
    return y


def rotated(rewrite: GraphRewrite, x: Optional[fx.Node], packed: IntScaleTensor, like: fx.Node) -> Optional[fx.Node]:
    """``x`` as the weight takes it: after the transform that the weight was multiplied by, if there is one."""
    return rewrite.call(hadamard.HADAMARD_OP, (x, packed.rotation), like=like) if packed.rotation else x


def static_scale(rewrite: GraphRewrite, candidate: Candidate) -> fx.Node:
    """The graph input for the static activation scale of a candidate's weight."""
    return _activation_part(rewrite, candidate, "act_pre_scale")


def _gathered(rewrite: GraphRewrite, candidate: Candidate) -> fx.Node:
    """The activation of a candidate, its features in the order of the columns of the weight."""
    order = _activation_part(rewrite, candidate, "input_order")
    flat = rewrite.call(torch.ops.aten.view.default, (order, [-1]), like=candidate.node)
    return rewrite.call(GATHER, (candidate.x, -1, flat), like=candidate.node)


def _activation_part(rewrite: GraphRewrite, candidate: Candidate, part: str) -> fx.Node:
    """The graph input for a part of a candidate's weight that says how its activation is taken."""
    assert candidate.source is not None and candidate.packed is not None
    value = getattr(candidate.packed, part)
    return rewrite.add_packed_input(ActivationPart((candidate.source,), part), part, value)


def gather_order(rewrite: GraphRewrite, node: object) -> Optional[fx.Node]:
    """The graph input that holds the input order, where a node is one of :func:`insert_qdq` that gathers; else None."""
    if not isinstance(node, fx.Node) or node.target is not GATHER:
        return None
    order = node.args[2].args[0] if isinstance(node.args[2], fx.Node) and node.args[2].args else None
    return order if isinstance(order, fx.Node) and order in rewrite.packed_inputs else None


def weight_inputs(rewrite: GraphRewrite, recipe: Packed, packed: IntScaleTensor) -> list[Optional[fx.Node]]:
    """Packed inputs for codes, group scales, row scales and zero points; None in place of zero points that are not there."""
    values = {name: getattr(packed, name) for name in (*packed.tensor_data_names, "zero_point")}
    return [None if v is None else rewrite.add_packed_input(recipe, name, v) for name, v in values.items()]


def dequantized_weight(
    rewrite: GraphRewrite, recipe: Packed, packed: IntScaleTensor, dtype: torch.dtype, like: fx.Node
) -> fx.Node:
    """Emit the packed inputs and the ``dequantize_weight`` node of a weight."""
    *parts, zero_point = weight_inputs(rewrite, recipe, packed)
    attributes = (packed.out_features, packed.in_features, packed.group_size, packed.packing_format, dtype)
    dense = None
    if rewrite.fake_mode is not None:
        with rewrite.fake_mode:
            shape = (*packed.qdata.shape[:-2], packed.out_features, packed.in_features)
            dense = torch.empty(shape, dtype=dtype, device=packed.device)
    node = rewrite.call(dequantize.WEIGHT_OP, (*parts, *attributes, zero_point), like=like, value=dense)
    node.meta["intscale_recipe"] = recipe
    node.meta["intscale_tensor"] = packed
    return node
