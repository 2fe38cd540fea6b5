"""Integer ranks: layers whose input features are divided among ranks give the integers of the whole layer.

    all_reduce(w4a8_linear(quantize_per_token(x)), "sum")
    =>  codes = int_quantize_to(x, all_reduce(int_largest(x), "max"))       one scale per token, of the whole row
        int_epilogue(all_reduce(w4a8_accumulate(codes), "sum"), ...)        the sum of int32 is exact, in any order

``x`` may be a gated activation or an activation, whose integers are taken before they are rounded to 16 fraction bits, as they
are on one rank. A bias is summed over the ranks, of which one has it. Matches the collectives of ``tensor_parallel.parallelize``;
left alone, and so refused: those of DTensors.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import fx

from ...kernels.arguments import LinearArguments, arguments_of
from ...kernels.integer.arithmetic import FRACTION
from ...kernels.integer.linear import EPILOGUE_OP
from ...kernels.integer.rows import ACTIVATED_OP, GATE_OP, GATED, LARGEST_OP, QUANTIZE_TO_OP
from ...kernels.quantize_per_token import OP as QUANTIZE
from ...kernels.w4a8_linear import ACCUMULATE_OP, LINEAR_OP
from ...ops import hadamard
from ..base import GraphRewrite, Pass
from .gates import gated, kind_of
from .nodes import either, erase_unread, name_of
from .parts import bias_input, part_input


def integer_ranks(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    linears = [node for node in rewrite.graph.nodes if node.target is LINEAR_OP]
    return sum(_divided(rewrite, node) for node in linears)


INTEGER_RANKS = Pass("integer_ranks", integer_ranks)


def _summed(node: fx.Node) -> Optional[tuple[fx.Node, str]]:
    """The sum over ranks that is the only reader of a product, waited for, and the name of its group."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or name_of(reader) != "all_reduce" or reader.args[1] != "sum":
        return None
    group: Any = reader.args[2]
    while len(reader.users) == 1 and name_of(next(iter(reader.users))) == "wait_tensor":
        reader = next(iter(reader.users))
    return reader, group


def _values(rewrite: GraphRewrite, x: fx.Node, like: fx.Node) -> tuple[fx.Node, int]:
    """The integers that are quantized, and their fraction bits."""
    gate = either(x, "mul", gated)
    if gate is not None:
        return rewrite.call(GATE_OP, gate, like=like), GATED
    kind = kind_of(x)
    if kind is not None:
        return rewrite.call(ACTIVATED_OP, (x.args[0], kind), like=like), FRACTION
    return x, FRACTION


def over_ranks(rewrite: GraphRewrite, node: fx.Node, how: str, group: str) -> fx.Node:
    """The sum or the maximum of a value over the ranks of a group."""
    collectives = torch.ops._c10d_functional
    made = rewrite.call(collectives.all_reduce.default, (node, how, group), like=node)
    return rewrite.call(collectives.wait_tensor.default, (made,), like=node)


def _divided(rewrite: GraphRewrite, node: fx.Node) -> bool:
    a = arguments_of(LinearArguments, node)
    found, quantize = _summed(node), a.xq.args[0]  # type: ignore[attr-defined]
    recipe, part = rewrite.packed_inputs.get(a.row_scale, (None, None))  # type: ignore[call-overload]
    bias = None if a.bias is None else bias_input(rewrite, a.bias)  # type: ignore[arg-type]
    if found is None or quantize.target is not QUANTIZE or part != "per_tensor_scale":
        return False
    if a.ste_input is not None or (bias is None) != (a.bias is None):
        return False
    (total, group), x, rotation = found, quantize.args[0], 0
    if x.target is hadamard.HADAMARD_OP:
        x, rotation = x.args[0], int(x.args[1])
    rows = part_input(rewrite, "rows", recipe.sources, recipe.transposed, recipe)
    with rewrite.graph.inserting_before(node):
        value, fraction = _values(rewrite, x, node)
        largest = over_ranks(rewrite, rewrite.call(LARGEST_OP, (value, rotation), like=node), "max", group)
        codes = rewrite.call(QUANTIZE_TO_OP, (value, largest, fraction, rotation), like=node)
        xq, scale = (rewrite.item(codes, i, node) for i in (0, 1))
        form = (a.out_features, a.group_size, a.scale_bits, a.packing, a.abi, a.zero_point)
        product = rewrite.call(ACCUMULATE_OP, (xq, a.qdata, a.scale, *form), like=node)
        acc = over_ranks(rewrite, product, "sum", group)
        whole_bias = None if bias is None else over_ranks(rewrite, bias, "sum", group)
        made = rewrite.call(EPILOGUE_OP, (acc, scale, rows, whole_bias), like=node)
    for key in ("intscale_candidates", "intscale_tensor"):
        if key in node.meta:
            product.meta[key] = node.meta[key]
    total.replace_all_uses_with(made)
    erase_unread(total)
    return True
