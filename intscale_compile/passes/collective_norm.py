"""An all-reduce in one step and what follows it in a decoder layer become one op, once ``quantize_collectives`` chose the form.

    sum = planned_all_reduce(x, "0:one_shot", group);  h = residual + sum;  y = weight * (h * rsqrt(mean(h**2) + eps))
    codes, scale = y quantized for each token     =>     h, codes, scale = intscale.all_reduce_norm_quantize(...)

Matches the operators that Inductor's decompositions leave of RMSNorm and of the quantization of an activation, in the order in
which transformers' models write them (Llama, Mistral, Qwen). ``y`` must have no other reader; ``h`` may.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import fx

from ..communication.fused_norm import ALL_REDUCE_NORM_QUANTIZE, SMALLEST, fits
from ..communication.link_table import ONE_SHOT
from ..communication.planned import PLANNED_ALL_REDUCE

ATEN, PRIMS = torch.ops.aten, torch.ops.prims
CONVERT = PRIMS.convert_element_type.default


@dataclass(frozen=True)
class Found:
    """Nodes of one match: what goes in, and the three results."""

    residual: fx.Node
    weight: fx.Node
    eps: float
    added: fx.Node
    codes: fx.Node
    scale: fx.Node


def fuse_norms(graph: fx.Graph) -> list[fx.Node]:
    """Rewrite every match; the nodes of the sums, which are gone."""
    fused = []
    for node in list(graph.nodes):
        if node.target is not PLANNED_ALL_REDUCE or node.args[1] != f"0:{ONE_SHOT}":
            continue
        found = match(node)
        if found is not None and _ready(node, found):
            _replace(graph, node, found)
            fused.append(node)
    return fused


def _only(node: fx.Node, target: Any, users: int = 1) -> Optional[fx.Node]:
    """The user of ``node`` that calls ``target``, where the node has so many users."""
    found = [user for user in node.users if user.target is target]
    return found[0] if len(node.users) == users and len(found) == 1 else None


def _chain(node: Optional[fx.Node], *targets: Any) -> Optional[fx.Node]:
    """Follow single users that call these, in turn."""
    for target in targets:
        node = None if node is None else _only(node, target)
    return node


def _other(node: fx.Node, one: fx.Node) -> Any:
    """The argument of a binary operator beside ``one``."""
    return node.args[1] if node.args[0] is one else node.args[0]


def match(total: fx.Node) -> Optional[Found]:
    """What follows a sum, or None where it is something else."""
    x = total.args[0].meta["val"]  # type: ignore[union-attr]
    added = _only(total, ATEN.add.Tensor)
    if added is None or not fits(x) or added.kwargs or added.meta["val"].dtype != x.dtype:
        return None
    residual = _other(added, total)
    if (
        not isinstance(residual, fx.Node)
        or residual.meta["val"].shape != x.shape
        or residual.meta["val"].dtype != x.dtype
    ):
        return None
    for values in added.users:
        if values.target is CONVERT and values.args[1] is torch.float32:
            normed = _norm(values)
            if normed is None:
                continue
            scaled, weight, eps = normed
            ends = _quantization(scaled)
            if ends is not None and weight.meta["val"].shape == x.shape[-1:] and weight.meta["val"].dtype == x.dtype:
                return Found(residual, weight, eps, added, *ends)
    return None


def _norm(values: fx.Node) -> Optional[tuple[fx.Node, fx.Node, float]]:
    """The product with the weight, the weight and eps of an RMSNorm of fp32 ``values``."""
    square = _only(values, ATEN.pow.Tensor_Scalar, 2)
    mean = _only(square, ATEN.mean.dim) if square is not None and square.args[1] == 2 else None
    if mean is None or list(mean.args[1]) != [-1] or mean.args[2:] != (True,) or mean.kwargs:  # type: ignore[arg-type]
        return None
    shifted = _only(mean, ATEN.add.Tensor)
    product = None if shifted is None else _chain(shifted, ATEN.rsqrt.default, ATEN.mul.Tensor)
    if product is None or not isinstance(shifted.args[1], float) or values not in product.args:  # type: ignore[union-attr]
        return None
    narrowed = _only(product, CONVERT)
    scaled = None if narrowed is None else _only(narrowed, ATEN.mul.Tensor)
    if scaled is None or not isinstance(weight := _other(scaled, narrowed), fx.Node):  # type: ignore[arg-type]
        return None
    return scaled, weight, shifted.args[1]  # type: ignore[union-attr, return-value]


def _quantization(scaled: fx.Node) -> Optional[tuple[fx.Node, fx.Node]]:
    """Codes and scales of the quantization of each row of ``scaled``, which has no other reader."""
    values = _only(scaled, CONVERT)
    largest = None if values is None else _only(values, ATEN.abs.default, 2)
    largest = None if largest is None else _chain(largest, ATEN.amax.default, ATEN.clamp_min.default)
    if values is None or largest is None or largest.args[1] != SMALLEST or list(largest.args[0].args[1]) != [-1]:  # type: ignore
        return None
    inverse = next((user for user in largest.users if user.target is ATEN.reciprocal.default), None)
    limited = next((user for user in largest.users if user.target is ATEN.lt.Scalar), None)
    step = next((user for user in largest.users if user.target is ATEN.mul.Tensor), None)
    if inverse is None or limited is None or step is None or len(largest.users) != 3 or limited.args[1] != float("inf"):
        return None
    factor = _only(inverse, ATEN.mul.Tensor)
    codes = None if factor is None or factor.args[1] != 127.0 else _chain(
        factor, ATEN.mul.Tensor, ATEN.round.default, ATEN.clamp_min.default, ATEN.clamp_max.default, CONVERT
    )  # fmt: skip
    scale = _only(step, ATEN.where.self)
    if codes is None or codes.args[1] is not torch.int8 or scale is None or scale.args[:2] != (limited, step):
        return None
    return (codes, scale) if step.args[1] == 0.007874015748031496 else None


def _ready(total: fx.Node, found: Found) -> bool:
    """Whether residual and weight are there where the sum is: the op stands in its place."""
    before = set(itertools.takewhile(lambda node: node is not total, total.graph.nodes))
    return {found.residual, found.weight} <= before


def _replace(graph: fx.Graph, total: fx.Node, found: Found) -> None:
    with graph.inserting_before(total):
        new = graph.call_function(
            ALL_REDUCE_NORM_QUANTIZE, (total.args[0], found.residual, found.weight, found.eps, total.args[2])
        )
        parts = [graph.call_function(operator.getitem, (new, i)) for i in range(3)]
    for part, old in zip(parts, (found.added, found.codes, found.scale)):
        part.meta.update({key: old.meta[key] for key in ("val", "tensor_meta", "stack_trace") if key in old.meta})
        old.replace_all_uses_with(part)
    new.meta["val"] = tuple(part.meta["val"] for part in parts)
    erased: set[fx.Node] = set()
    stack = [found.codes, found.scale]
    while stack:  # what nothing reads any more, up to the sum
        node = stack.pop()
        if not node.users and node not in erased and node.op == "call_function":
            sources = node.all_input_nodes
            graph.erase_node(node)
            erased.add(node)
            stack += [source for source in sources if source is not found.residual and source is not found.weight]
