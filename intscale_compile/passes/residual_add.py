"""Residual addition: ``residual + linear(x)`` becomes one op, whose GEMM adds in its epilogue.

    w4a8_linear(...) + residual   =>   w4a8_linear_add(..., residual)

Matches ``+`` and ``torch.add`` in either order, of equal shapes and dtypes, where nothing else reads the linear. Left alone:
graphs that autograd watches, few tokens, linears that Inductor will compile from the template (it fuses the addition
itself), sums whose strides are not those of a new tensor and may be looked at (:mod:`.layout`), tensors that are not on a GPU
(unless ``intscale.force_passes`` names this pass).
"""

from __future__ import annotations

import operator
from typing import Optional

import torch
from torch import Tensor, fx

from ..kernels.arguments import LinearAddArguments, LinearArguments, arguments_of, converted
from ..kernels.w4a8_linear import LINEAR_OP
from ..kernels.w4a8_residual import LINEAR_ADD_OP
from .base import GraphRewrite, Pass, example
from .gated_activation import tokens_hint, unwatched
from .layout import take, values_if_contiguous

ADDITION = {operator.add, torch.add, "add"}
LEAST_TOKENS = 256  # below, the norm's kernel is a launch and no traffic


def residual_add(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        linear = _match(node) if node.target in ADDITION else None
        values = values_if_contiguous(rewrite, node) if linear and _worthwhile(rewrite, linear) else None
        if linear is not None and values is not None:
            take(rewrite, node, values)
            _replace(rewrite, node, linear)
            done += 1
    return done


RESIDUAL_ADD = Pass("residual_add", residual_add)


def _match(addition: fx.Node) -> Optional[fx.Node]:
    """The linear that is added to something of its shape and dtype and read by nothing else, or None."""
    terms = [node for node in addition.args if isinstance(node, fx.Node)]
    if len(addition.args) != 2 or addition.kwargs or len(set(terms)) != 2:
        return None
    values = [example(node) for node in (addition, *terms)]
    if any(not isinstance(value, Tensor) for value in values):
        return None
    alike = all((value.shape, value.dtype) == (values[0].shape, values[0].dtype) for value in values)
    return next((node for node in terms if alike and _is_free(node)), None)


def _is_free(node: fx.Node) -> bool:
    mine = node.target is LINEAR_OP and "intscale_tensor" in node.meta
    return mine and len(node.users) == 1 and unwatched(node)


def _worthwhile(rewrite: GraphRewrite, linear: fx.Node) -> bool:
    forced, value = "residual_add" in rewrite.settings.force_passes, example(linear)
    hint = tokens_hint(value)
    if hint is None or hint < LEAST_TOKENS or not forced and value.device.type != "cuda":
        return False
    return forced or _calls_the_op(rewrite, linear, hint)


def _calls_the_op(rewrite: GraphRewrite, linear: fx.Node, tokens: int) -> bool:
    """Whether Inductor will call the op and not its template."""
    # Imports Triton, which only GPUs need.
    from ..kernels.template import op_is_faster

    packed = linear.meta["intscale_tensor"]
    dtypes, asymmetric = (packed.qdata.dtype, packed.scale.dtype), packed.zero_point is not None
    form = (packed.group_size, packed.scale_bits, packed.packing_format)
    features = (packed.in_features, packed.out_features)
    return op_is_faster(tokens, rewrite.cuda_graphs, *features, dtypes, *form, packed.device, asymmetric)


def _replace(rewrite: GraphRewrite, addition: fx.Node, linear: fx.Node) -> None:
    residual = next((node for node in addition.args if node is not linear), None)
    arguments = converted(LinearAddArguments, arguments_of(LinearArguments, linear), residual=residual)
    with rewrite.graph.inserting_before(addition):
        fused = rewrite.call(LINEAR_ADD_OP, tuple(arguments), like=linear)
    for key in ("intscale_candidates", "intscale_grad", "intscale_tensor"):
        fused.meta[key] = linear.meta[key]
    addition.replace_all_uses_with(fused)
    rewrite.graph.erase_node(addition)
    rewrite.graph.erase_node(linear)
