"""Experts: grouped and batched products with a stack of expert weights become one op on codes.

    grouped_mm(x[rows], stack.transpose(-2, -1), offs=offsets)         rows sorted by expert
    =>  w4a8_grouped_linear(*quantize_per_token(x), codes and scales of the stack, offsets, row_index=rows)

    bmm(stack[ids], x.unsqueeze(-1))    or    bmm(x.unsqueeze(1), stack[ids])
    =>  the same on ``ids`` in sorted order; no expert's weights are copied
    bmm(x, stack)                       the same number of rows for every expert

Matches the candidates that ``match`` listed as experts, in both orientations of the stack: transformers' experts
implementations ``grouped_mm`` (also its ``grouped_mm_fallback`` op) and ``batched_mm``, and Llama 4. An activation that is
gathered from tokens is quantized once per token, and gathered inside the op; with static activation scales, one for each
expert, it is gathered before. What is left keeps its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ..kernels.arguments import GroupedArguments
from ..kernels.w4a8_grouped import GROUPED_OP
from ..ops import KERNEL_ABI, quantize_per_token, quantize_static
from ..reasons import Reason
from .base import Candidate, GraphRewrite, Pass, example, writes_in_place
from .fuse import straight_through
from .insert_qdq import decline, pack, recipe_of, rotated, static_scale, weight_inputs
from .layout import take, values_if_contiguous
from .match import (
    MATMUL,
    TRANSPOSES,
    WeightFinder,
    argument,
    function_name,
    holds_experts,
    reason_against,
    report,
    swaps_last_two,
    tokens_of,
)
from .packed_weights import WeightSource
from .share_quantize import written_between

INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass
class _Product:
    """A product with a stack of experts.

    Attributes:
        x: its activation; ``[rows, K]`` sorted by expert, or with ``ids`` ``[S, 1, K]`` or ``[S, K, 1]``, or ``[E, M, K]``.
        weight, source, transposed: the stack, as in ``Candidate``.
        offsets: of a grouped product.
        ids: which expert each matrix of a batched product uses; None where it is all of them in order.
        column: whether rows of ``x`` are columns, because the stack is the left operand.
    """

    x: fx.Node
    weight: fx.Node
    source: WeightSource
    transposed: bool
    offsets: Optional[fx.Node] = None
    ids: Optional[fx.Node] = None
    column: bool = False


def experts(rewrite: GraphRewrite) -> int:
    """Replace every product with a stack of experts that can be quantized; returns how many."""
    weights = WeightFinder(rewrite)
    orders: dict[tuple, tuple[fx.Node, fx.Node]] = {}
    done = 0
    for candidate in rewrite.candidates:
        if candidate.reason is not Reason.EXPERTS:
            continue
        product = _grouped(candidate.node, weights) or _batched(candidate.node, weights)
        if product is not None:
            shape = tuple(weights.tensor(product.source).shape[-2:])
            candidate.shape = shape[::-1] if product.transposed else shape  # type: ignore[assignment]
            candidate.x, candidate.weight, candidate.source = product.x, product.weight, product.source
            candidate.transposed, candidate.tokens = product.transposed, _rows(product)
            candidate.reason = reason_against(candidate, weights, candidate.node.meta["intscale_grad"])
            if candidate.reason is None and pack(rewrite, candidate):
                values = values_if_contiguous(rewrite, candidate.node)
                if values is None:
                    decline(candidate)
                else:
                    take(rewrite, candidate.node, values)
                    _replace(rewrite, candidate, product, orders)
                    done += 1
        elif not holds_experts(candidate.node, candidate.name):
            candidate.reason = Reason.UNKNOWN_FORM
        if candidate.reason is not None:
            report(candidate)
    return done


EXPERTS = Pass("experts", experts)


def _rows(product: _Product) -> str:
    value = example(product.x)
    return tokens_of(product.x) if not product.column or not isinstance(value, Tensor) else str(value.shape[0])


def _rank(node: Any) -> int:
    value = example(node)
    return value.dim() if isinstance(node, fx.Node) and isinstance(value, Tensor) else -1


def _is_index(node: Any) -> bool:
    return _rank(node) == 1 and example(node).dtype in INDEX_DTYPES


def _grouped(node: fx.Node, weights: WeightFinder) -> Optional[_Product]:
    if "grouped_mm" not in function_name(node):
        return None
    x, weight = argument(node, 0, "input", "mat_a", "self"), argument(node, 1, "weight", "mat_b", "mat2")
    offsets, bias = argument(node, 2, "offs"), argument(node, 3, "bias")
    source, flipped = weights.resolve(weight)
    if (
        source is None
        or weights.tensor(source).dim() != 3
        or _rank(x) != 2
        or not _is_index(offsets)
        or bias is not None
    ):
        return None
    return _Product(x, weight, source, not flipped, offsets)


def _batched(node: fx.Node, weights: WeightFinder) -> Optional[_Product]:
    name = function_name(node)
    if name != "bmm" and node.target not in MATMUL and name != "matmul":
        return None
    left, right = argument(node, 0, "input"), argument(node, 1, "mat2", "other")
    if _rank(left) != 3 or _rank(right) != 3:
        return None
    source, flipped, ids = _chosen(right, weights)
    if source is not None and (ids is None or example(left).shape[1] == 1):
        return _Product(left, right, source, not flipped, ids=ids)
    source, flipped, ids = _chosen(left, weights)
    if source is not None and ids is not None and example(right).shape[2] == 1:
        return _Product(right, left, source, flipped, ids=ids, column=True)
    return None


def _chosen(node: fx.Node, weights: WeightFinder) -> tuple[Optional[WeightSource], bool, Optional[fx.Node]]:
    """The stack behind ``node``, whether it is transposed on the way, and the index that chooses experts, if one does."""
    source, flipped = weights.resolve(node)
    if source is not None:
        return (source, flipped, None) if weights.tensor(source).dim() == 3 else (None, False, None)
    after = False
    while isinstance(node, fx.Node) and function_name(node) in TRANSPOSES and swaps_last_two(node, function_name(node)):
        node, after = node.args[0], not after  # type: ignore[assignment]
    chosen = _gather(node)
    source, flipped = weights.resolve(chosen[0]) if chosen else (None, False)
    if source is None or chosen is None or weights.tensor(source).dim() != 3:
        return None, False, None
    return source, flipped != after, chosen[1]


def _gather(node: Any) -> Optional[tuple[fx.Node, fx.Node]]:
    """Source and index of ``source[index]`` along the first dimension, both nodes, the index of one dimension."""
    name = function_name(node) if isinstance(node, fx.Node) else ""
    if name in ("getitem", "__getitem__"):
        index = node.args[1]
    elif name == "index_select" and argument(node, 1, "dim") == 0:
        index = argument(node, 2, "index")
    else:
        return None
    if not _is_index(index) or any(writes_in_place(user) for user in node.users):
        return None
    return node.args[0], index


def _replace(rewrite: GraphRewrite, candidate: Candidate, product: _Product, orders: dict) -> None:
    node = candidate.node
    with rewrite.graph.inserting_before(node):
        if product.offsets is not None:
            rows, row_index = _tokens_behind(product.x, node)
            y = _emit(rewrite, candidate, rows, product.offsets, row_index, None)
        elif product.ids is not None:
            y = _batched_by_ids(rewrite, candidate, product, orders)
        else:
            y = _batched_in_order(rewrite, candidate, product)
    node.replace_all_uses_with(y)
    rewrite.graph.erase_node(node)


def _batched_by_ids(rewrite: GraphRewrite, candidate: Candidate, product: _Product, orders: dict) -> fx.Node:
    """One row per matrix: sorted by expert on the way in, back in order on the way out."""
    node, dim = candidate.node, -1 if product.column else 1
    count = candidate.packed.shape[0]  # type: ignore[union-attr]
    order, offsets = orders.get((product.ids, count)) or _sorted(rewrite, product.ids, count, node)
    orders[product.ids, count] = order, offsets
    rows = product.x
    if function_name(rows) == "unsqueeze" and argument(rows, 1, "dim") in (dim, dim % 3):
        rows = rows.args[0]  # type: ignore[assignment]
    else:
        rows = rewrite.call(torch.squeeze, (rows, dim), like=node)
    row_index, repeated = order, argument(rows, 1, "repeats")
    whole_rows = (
        function_name(rows) == "repeat_interleave" and argument(rows, 2, "dim") == 0 and _rank(rows.args[0]) == 2
    )
    if whole_rows and isinstance(repeated, int) and not written_between(rows, node):
        row_index = rewrite.call(torch.floor_divide, (order, repeated), like=node)
        rows = rows.args[0]  # type: ignore[assignment]
    y = _emit(rewrite, candidate, rows, offsets, row_index, order)
    return rewrite.call(torch.unsqueeze, (y, dim), like=node)


def _sorted(rewrite: GraphRewrite, ids: Optional[fx.Node], count: int, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Order that sorts ``ids`` and offsets of the experts in it: ``experts.sort_by_expert`` as nodes."""
    value = example(ids)
    pair = rewrite.call(torch.sort, (ids,), like=like)
    in_order = rewrite.item(pair, 0, like)
    numbers = rewrite.call(torch.arange, (count,), {"device": value.device, "dtype": value.dtype}, like=like)
    offsets = rewrite.call(torch.searchsorted, (in_order, numbers), {"right": True, "out_int32": True}, like=like)
    return rewrite.item(pair, 1, like), offsets


def _batched_in_order(rewrite: GraphRewrite, candidate: Candidate, product: _Product) -> fx.Node:
    """The same number of rows for every expert."""
    node, stack = candidate.node, candidate.packed
    assert stack is not None
    count, features = stack.shape[0], stack.out_features
    value = example(product.x)
    rows = value.shape[1]
    if not isinstance(rows, int):
        rows = rewrite.call(torch.ops.aten.sym_size.int, (product.x, 1), like=node)
    ends = rewrite.call(torch.arange, (1, count + 1), {"device": value.device, "dtype": torch.int32}, like=node)
    offsets = rewrite.call(torch.mul, (ends, rows), like=node)
    flat = rewrite.call(torch.reshape, (product.x, (-1, stack.in_features)), like=node)
    y = _emit(rewrite, candidate, flat, offsets, None, None)
    return rewrite.call(torch.reshape, (y, (count, -1, features)), like=node)


def _tokens_behind(x: fx.Node, node: fx.Node) -> tuple[fx.Node, Optional[fx.Node]]:
    """Tokens and index where ``x`` is ``tokens[index]``: then no gathered copy is needed. Else ``x`` itself."""
    gathered: Any = x
    while function_name(gathered) == "to" and example(gathered).dtype == example(gathered.args[0]).dtype:
        if any(writes_in_place(user) for user in gathered.users):
            return x, None
        gathered = gathered.args[0]
    found = _gather(gathered)
    if found is None or _rank(found[0]) != 2 or written_between(gathered, node):
        return x, None
    return found


def _emit(
    rewrite: GraphRewrite, candidate: Candidate, rows: fx.Node, offsets: fx.Node, row_index: Optional[fx.Node],
    out_index: Optional[fx.Node],
) -> fx.Node:  # fmt: skip
    """The quantization of ``rows`` and the op, ``[positions, N]``."""
    node, packed = candidate.node, candidate.packed
    assert packed is not None
    recipe = recipe_of(candidate, rewrite)
    qdata, scale, row_scale, zero_point = weight_inputs(rewrite, recipe, packed)
    x, quantized, index = _quantized(rewrite, candidate, rows, offsets, row_index)
    arguments: Any = dict(
        xq=rewrite.item(quantized, 0, node),
        token_scale=rewrite.item(quantized, 1, node),
        qdata=qdata,
        scale=scale,
        row_scale=row_scale,
        bias=None,
        offsets=offsets,
        out_features=packed.out_features,
        group_size=packed.group_size,
        scale_bits=packed.scale_bits,
        packing=packed.packing_format,
        dtype=example(node).dtype,
        abi=KERNEL_ABI,
        row_index=index,
        out_index=out_index,
        ste_input=straight_through(x, node, rows),
        zero_point=zero_point,
    )
    y = rewrite.call(GROUPED_OP, tuple(GroupedArguments(**arguments)), like=node)
    y.meta["intscale_candidates"], y.meta["intscale_tensor"] = [candidate], packed
    return y


def _quantized(
    rewrite: GraphRewrite, candidate: Candidate, rows: fx.Node, offsets: fx.Node, row_index: Optional[fx.Node]
) -> tuple[Any, fx.Node, Optional[fx.Node]]:
    """The activation as the stack takes it, its quantization, and the index that is left to the op."""
    node, packed = candidate.node, candidate.packed
    assert packed is not None
    if packed.act_pre_scale is None:
        x = rotated(rewrite, rows, packed, node)
        return x, rewrite.call(quantize_per_token.OP, (x,), like=node), row_index
    if row_index is not None:
        rows = rewrite.call(torch.index_select, (rows, 0, row_index), like=node)
    scale = _scale_of_positions(rewrite, candidate, rows, offsets)
    x = rotated(rewrite, rows, packed, node)
    return x, rewrite.call(quantize_static.STATIC_OP, (x, scale), like=node), None


def _scale_of_positions(rewrite: GraphRewrite, candidate: Candidate, rows: fx.Node, offsets: fx.Node) -> fx.Node:
    """Static activation scale of every sorted position: ``experts.scale_of_positions`` as nodes."""
    node, value = candidate.node, example(offsets)
    count = example(rows).shape[0]
    if not isinstance(count, int):
        count = rewrite.call(torch.ops.aten.sym_size.int, (rows, 0), like=node)
    positions = rewrite.call(torch.arange, (count,), {"device": value.device, "dtype": value.dtype}, like=node)
    expert = rewrite.call(torch.searchsorted, (offsets, positions), {"right": True}, like=node)
    expert = rewrite.call(torch.clamp, (expert,), {"max": candidate.packed.shape[0] - 1}, like=node)  # type: ignore[union-attr]
    scales = rewrite.call(torch.reshape, (static_scale(rewrite, candidate), (-1, 1)), like=node)
    return rewrite.call(torch.index_select, (scales, 0, expert), like=node)
