"""Fuse: a linear in Q/DQ form becomes one op on codes.

    linear(dequantize_per_token(xq, token_scale), dequantize_weight(qdata, scale, row_scale, ...), bias)
    =>  w4a8_linear(xq, token_scale, qdata, scale, row_scale, bias, ...)

Matches every linear whose two operands are dequantize nodes. Where autograd is watching, the op also takes the activation
before quantization, to pass its gradient straight through.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import fx

from ..kernels.arguments import (
    DequantizeTokenArguments,
    DequantizeWeightArguments,
    LinearArguments,
    arguments_of,
    converted,
)
from ..kernels.w4a8_linear import LINEAR_OP
from ..ops import KERNEL_ABI, dequantize, hadamard
from .base import GraphRewrite, Pass, example
from .insert_qdq import gather_order
from .match import LINEAR


def fuse(rewrite: GraphRewrite) -> int:
    """Replace every linear in Q/DQ form; returns how many."""
    fused = 0
    for node in list(rewrite.graph.nodes):
        if node.target in LINEAR and _is_qdq(node):
            _replace(rewrite, node)
            fused += 1
    return fused


FUSE = Pass("fuse", fuse)


def _is_qdq(node: fx.Node) -> bool:
    x, weight = node.args[:2]
    return (
        isinstance(x, fx.Node)
        and isinstance(weight, fx.Node)
        and x.target is dequantize.TOKEN_OP
        and weight.target is dequantize.WEIGHT_OP
    )


def _replace(rewrite: GraphRewrite, node: fx.Node) -> None:
    x, weight, bias = node.args
    xq, token_scale, _ = arguments_of(DequantizeTokenArguments, x)  # type: ignore[arg-type]
    stored = arguments_of(DequantizeWeightArguments, weight)  # type: ignore[arg-type]
    activation: Any = xq.args[0].args[0]  # type: ignore[attr-defined]
    arguments = converted(
        LinearArguments,
        stored,
        xq=xq,
        token_scale=token_scale,
        bias=bias,
        scale_bits=weight.meta["intscale_tensor"].scale_bits,  # type: ignore[union-attr]
        abi=KERNEL_ABI,
        ste_input=straight_through(activation, node, _origin(rewrite, activation)),
        overlap=True,  # a kernel of this graph quantizes the activation, so no writer of the weight is running
    )
    with rewrite.graph.inserting_before(node):
        fused = rewrite.call(LINEAR_OP, tuple(arguments), like=node)
    for key in ("intscale_candidates", "intscale_grad"):
        fused.meta[key] = node.meta[key]
    fused.meta["intscale_tensor"] = weight.meta["intscale_tensor"]  # type: ignore[union-attr]
    node.replace_all_uses_with(fused)
    rewrite.graph.erase_node(node)


def _origin(rewrite: GraphRewrite, activation: fx.Node) -> object:
    """What the activation was computed from by a pass."""
    emitted = activation.target is hadamard.HADAMARD_OP or gather_order(rewrite, activation) is not None
    return activation.args[0] if emitted else activation


def straight_through(activation: fx.Node, node: fx.Node, origin: object) -> Optional[fx.Node]:
    """The activation where autograd watches it, for a gradient that passes the quantizer; else None.

    ``origin``: what it was computed from in the original graph; fake tensors of emitted nodes do not say who requires grad.
    """
    value = example(origin)
    watched = node.meta["intscale_grad"] and (not isinstance(value, torch.Tensor) or value.requires_grad)
    return activation if watched else None
