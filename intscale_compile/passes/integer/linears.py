"""Integer linears: quantizations and linear layers on Q16.

    quantize_per_token(x)                        =>  int_quantize(x)
    w4a8_linear(xq, token_scale, ..., bias)      =>  int_linear(xq, token_scale, ..., bias), scales as dyadic numbers

Left alone: static activation scales, input orders, biases that the graph computes.
"""

from __future__ import annotations

from torch import fx

from ...kernels.arguments import LinearArguments, arguments_of
from ...kernels.integer.linear import LINEAR_OP as INTEGER_LINEAR
from ...kernels.integer.rows import QUANTIZE_OP
from ...kernels.quantize_per_token import OP as QUANTIZE
from ...kernels.w4a8_linear import LINEAR_OP
from ...ops import hadamard
from ..base import GraphRewrite, Pass
from .nodes import codes_for_readers, emitter, erase_unread
from .parts import bias_input, part_input


def integer_linears(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    for node in list(rewrite.graph.nodes):
        if any(reader.target in (QUANTIZE, hadamard.HADAMARD_OP) for reader in node.users):
            codes_for_readers(rewrite, node, emitter(rewrite, QUANTIZE_OP, (node,), node))
    return sum(_linear(rewrite, node) for node in list(rewrite.graph.nodes) if node.target is LINEAR_OP)


INTEGER_LINEARS = Pass("integer_linears", integer_linears)


def _linear(rewrite: GraphRewrite, node: fx.Node) -> bool:
    a = arguments_of(LinearArguments, node)
    recipe, part = rewrite.packed_inputs.get(a.row_scale, (None, None))  # type: ignore[call-overload]
    bias = None if a.bias is None else bias_input(rewrite, a.bias)  # type: ignore[arg-type]
    if part != "per_tensor_scale" or a.ste_input is not None or (bias is None) != (a.bias is None):
        return False
    rows = part_input(rewrite, "rows", recipe.sources, recipe.transposed, recipe)
    form = (a.out_features, a.group_size, a.scale_bits, a.packing, a.abi, a.zero_point)
    with rewrite.graph.inserting_before(node):
        made = rewrite.call(INTEGER_LINEAR, (a.xq, a.token_scale, a.qdata, a.scale, rows, bias, *form), like=node)
    for key in ("intscale_candidates", "intscale_tensor"):
        if key in node.meta:
            made.meta[key] = node.meta[key]
    node.replace_all_uses_with(made)
    erase_unread(node)
    return True
