"""Other products: what match lists with a reason although no pass quantizes it, so that nothing is skipped silently.

Lists convolutions, operators that hold several linears (``nn.MultiheadAttention``), products whose weight is computed from
parameters (a slice, a scaled weight), and linears in the bodies of higher-order operators. Emits nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..reasons import Reason
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.product_forms import OTHER_FORMS
from .base import Candidate, GraphRewrite, example
from .packed_weights import WeightSource

if TYPE_CHECKING:
    from .match import WeightFinder

PRODUCTS = OTHER_FORMS | {
    "matmul", "mm", "__matmul__", "__rmatmul__", "linalg_matmul", "addmm", "addmm_", "bmm", "einsum", "tensordot", "inner",
    "mv", "addmv",
    *(f"linalg_{name}" for name in OTHER_FORMS),
}  # fmt: skip
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
SEVERAL_LINEARS = {
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
}


def other_products(rewrite: GraphRewrite, weights: WeightFinder) -> Iterator[Candidate]:
    """Every product with a weight that is not among the candidates yet."""
    known = {candidate.node for candidate in rewrite.candidates}
    computed = _computed_weights(rewrite, weights)
    for node in rewrite.graph.nodes:
        if node.op not in ("call_function", "call_method") or node in known:
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").split(".")[0]
        if name in PRODUCTS:
            yield from _computed_product(node, computed, weights)
        elif name in CONVOLUTIONS:
            yield from _weights_of(node, weights, Reason.CONVOLUTION)
        elif node.target in SEVERAL_LINEARS:
            yield from _weights_of(node, weights, Reason.ONE_OPERATOR)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            yield from _in_bodies(rewrite, weights, node)


def _weights_of(node: fx.Node, weights: WeightFinder, reason: Reason) -> Iterator[Candidate]:
    for used in node.all_input_nodes:
        source, transposed = weights.resolve(used)
        if source is None or (tensor := weights.tensor(source)).dim() < 2:
            continue
        shape = (tensor.shape[0], tensor.numel() // tensor.shape[0])
        yield Candidate(node, source.name, None, used, None, source, transposed, shape, reason)


def _in_bodies(rewrite: GraphRewrite, weights: WeightFinder, node: fx.Node) -> Iterator[Candidate]:
    """Linears in the bodies that a higher-order operator calls; a body takes its weights as arguments."""
    for body_node in node.all_input_nodes:
        body = getattr(rewrite.gm, str(body_node.target), None) if body_node.op == "get_attr" else None
        if not isinstance(body, fx.GraphModule):
            continue
        parameters = [n for n in body.graph.nodes if n.op == "placeholder"]
        flat = torch.utils._pytree.arg_tree_leaves(*node.args)  # the operands come last
        operands: dict[fx.Node, Any] = dict(zip(parameters, flat[len(flat) - len(parameters) :]))
        for inner in body.graph.nodes:
            if inner.target in (F.linear, torch._C._nn.linear):
                weight = inner.args[1] if len(inner.args) > 1 else inner.kwargs["weight"]
                source = weights.source(operands.get(weight))
                name = source.name if source else f"{body_node.target}.{inner.name}"
                yield Candidate(inner, name, None, weight, None, source, False, None, Reason.SUBGRAPH)


def _computed_weights(rewrite: GraphRewrite, weights: WeightFinder) -> dict[fx.Node, Optional[WeightSource]]:
    """Nodes that depend on parameters, buffers and constants only; with a matrix among the parameters, if there is one."""
    found: dict[fx.Node, Optional[WeightSource]] = {}
    for node in rewrite.graph.nodes:
        source = weights.source(node)
        if source is not None:
            tensor = weights.tensor(source)
            is_matrix = isinstance(tensor, (torch.nn.Parameter, IntScaleTensor)) and tensor.dim() > 1
            found[node] = source if is_matrix else None
        elif node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            found[node] = next((found[n] for n in node.all_input_nodes if found[n] is not None), None)
    return found


def _computed_product(
    node: fx.Node, computed: dict[fx.Node, Optional[WeightSource]], weights: WeightFinder
) -> Iterator[Candidate]:
    """A product of an activation with a matrix that is computed from a parameter, or is an unknown view of one."""
    if node in computed:  # of two weights: no activation
        return
    for used in node.all_input_nodes:
        source, value = computed.get(used), example(used)
        if source is not None and isinstance(value, Tensor) and value.dim() > 1:
            reason = Reason.NOT_CONSTANT if weights.viewed(used) is None else Reason.UNKNOWN_VIEW
            yield Candidate(node, source.name, None, used, None, None, False, None, reason)
            return
