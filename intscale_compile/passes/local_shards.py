"""Local shards: products with weights that DTensor has divided among ranks, written with each rank's own shard.

    x' = from_local(x, Replicate)    y = linear(x', DTensor W sharded by rows, b)    y.to_local()
    =>  linear(x, shard of W, shard of b)
    x' = from_local(x, Shard(-1))    y = linear(x', DTensor W sharded by features, b)    y.redistribute(Replicate).to_local()
    =>  from_local(linear(x, shard of W, b / ranks), Partial).redistribute(Replicate).to_local()

and ``W.to_local()``, as transformers writes it, becomes the shard. Matches quantized weights on meshes of one dimension where
no gradient is wanted. The graph then takes the shards as inputs in place of the DTensors, and every pass after this one
sees an ordinary graph. A bias behind a sum over ranks is divided among them, which is what DTensor does with it.
A product in another form stays with DTensor: it runs quantized through the tensor subclass, and match gives its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ..integrations.torch import dtensor_class, is_dtensor, local_tensor
from ..tensors.intscale_tensor import IntScaleTensor
from .base import EXAMPLE, GraphRewrite, Pass, example
from .match import LINEAR, argument, function_name

FROM_LOCAL, REDISTRIBUTE, TO_LOCAL = "from_local", "redistribute", "to_local"


def local_shards(rewrite: GraphRewrite) -> int:
    """Write products with sharded weights in local form; returns how many uses of a weight were rewritten."""
    weights = {
        node: index
        for node, index in rewrite.input_index.items()
        if is_dtensor(value := rewrite.example_inputs[index]) and isinstance(local_tensor(value), IntScaleTensor)
    }
    if not weights or rewrite.fake_mode is None:
        return 0
    count = 0
    grad_enabled = torch.is_grad_enabled()
    for node in list(rewrite.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = bool(node.args[0])
        elif node.target in LINEAR and argument(node, 1, "weight") in weights:
            count += _linear(rewrite, node, grad_enabled)
        elif _does(node, TO_LOCAL) and node.args[0] in weights:
            node.replace_all_uses_with(local_input(rewrite, node.args[0]))
            rewrite.graph.erase_node(node)
            count += 1
    for node in rewrite.local_inputs:
        _wrap_other_uses(rewrite, node)
    return count


LOCAL_SHARDS = Pass("local_shards", local_shards)


def _does(node: Any, what: str) -> bool:
    """Whether a node converts between a DTensor and a local one; torch 2.11 gives these functions one of two prefixes."""
    return isinstance(node, fx.Node) and function_name(node).removeprefix("prim ").removeprefix("prim_") == what


def local_input(rewrite: GraphRewrite, node: fx.Node) -> fx.Node:
    """The input ``node``, which from now on takes the local tensor of what the caller passes."""
    if node not in rewrite.local_inputs:
        index = rewrite.input_index[node]
        rewrite.local_inputs[node] = index, example(node), tuple(node.users)
        rewrite.example_inputs = list(rewrite.example_inputs)
        rewrite.example_inputs[index] = local_tensor(rewrite.example_inputs[index])
        node.meta[EXAMPLE] = local_tensor(example(node))
    return node


def _linear(rewrite: GraphRewrite, node: fx.Node, grad_enabled: bool) -> bool:
    """Rewrite one product, if its operands are placed in one of the forms above."""
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    placed, y = example(x), example(node)
    sharded = rewrite.local_inputs[weight][1] if weight in rewrite.local_inputs else example(weight)
    if not is_dtensor(placed) or not is_dtensor(y) or sharded.device_mesh.ndim != 1:
        return False
    if grad_enabled and (placed.requires_grad or (bias is not None and example(bias).requires_grad)):
        return False
    form = _form(placed, sharded)
    if form is None or (bias is not None and not _bias_fits(rewrite, bias, form)):
        return False
    with rewrite.graph.inserting_before(node):
        shared = None if bias is None else local_input(rewrite, bias)
        if shared is not None and form == "features":
            shared = rewrite.call(torch.div, (shared, sharded.device_mesh.size()), like=node)
        operands = (_local(rewrite, x), local_input(rewrite, weight), shared)
        product = rewrite.call(torch.nn.functional.linear, operands, like=node, value=local_tensor(y))
    _replace(rewrite, node, product)
    return True


def _form(x: Any, weight: Any) -> Optional[str]:
    """``"rows"``, ``"features"`` or ``"whole"``: how the weight is divided, where the activation is placed to match."""
    (on,), (by,) = x.placements, weight.placements
    if by.is_shard(0) and on.is_replicate():
        return "rows"
    if by.is_shard(1) and on.is_shard(x.dim() - 1):
        return "features"
    return "whole" if by.is_replicate() and (on.is_replicate() or on.is_shard() and on.dim < x.dim() - 1) else None


def _bias_fits(rewrite: GraphRewrite, bias: Any, form: str) -> bool:
    if bias in rewrite.local_inputs:
        value = rewrite.local_inputs[bias][1]
    elif bias in rewrite.input_index and is_dtensor(example(bias)):
        value = example(bias)
    else:
        return False
    return value.placements[0].is_shard(0) if form == "rows" else value.placements[0].is_replicate()


def _local(rewrite: GraphRewrite, node: fx.Node) -> fx.Node:
    """The local tensor of a DTensor node; of one that was just made from a local tensor, that."""
    source = node
    while _does(source, REDISTRIBUTE) and _placements(source.args[0]) == _placements(node):
        source = source.args[0]  # type: ignore[assignment]
    if _does(source, FROM_LOCAL):
        return source.args[0]  # type: ignore[return-value]
    shared = next((user for user in source.users if user.target is to_local), None)  # of a sibling: one tensor for both
    return shared or rewrite.call(to_local, (source,), like=node, value=local_tensor(example(source)))


def _placements(node: Any) -> Any:
    value = example(node)
    return value.placements if is_dtensor(value) else None


def _replace(rewrite: GraphRewrite, node: fx.Node, product: fx.Node) -> None:
    """Give the readers of a product its local form where they ask for that, and a DTensor to the others."""
    chain = [node]
    for reader in chain:
        for user in list(reader.users):
            if _does(user, TO_LOCAL):
                user.replace_all_uses_with(product)
                rewrite.graph.erase_node(user)
            elif _does(user, REDISTRIBUTE) and _placements(user) == _placements(node):
                chain.append(user)
    for reader in reversed(chain[1:]):
        if not reader.users:
            rewrite.graph.erase_node(reader)
    if node.users:
        with rewrite.graph.inserting_after(product):
            wrapped = rewrite.call(from_shard(example(node)), (product,), like=node, value=example(node))
        node.replace_all_uses_with(wrapped)
    rewrite.graph.erase_node(node)


def _wrap_other_uses(rewrite: GraphRewrite, node: fx.Node) -> None:
    """Give the readers that still expect a DTensor one."""
    _, original, readers = rewrite.local_inputs[node]
    others = [reader for reader in readers if reader in node.users]
    if others:
        with rewrite.graph.inserting_before(next(n for n in rewrite.graph.nodes if n.op != "placeholder")):
            wrapped = rewrite.call(from_shard(original), (node,), like=node, value=original)
        for reader in others:
            reader.replace_input_with(node, wrapped)


def to_local(value: Any) -> Tensor:
    """The local tensor of a DTensor."""
    return value.to_local()


def from_shard(like: Any) -> Callable[[Tensor], Any]:
    """A function that makes a DTensor, placed as ``like`` is, of a local tensor."""
    mesh, placements = like.device_mesh, tuple(like.placements)

    def from_shard(local: Tensor) -> Any:
        return dtensor_class().from_local(local, mesh, placements, run_check=False)

    return from_shard


def takes_shards(compiled: Callable, indices: Sequence[int]) -> Callable:
    """``compiled`` behind a signature that has DTensors at ``indices`` where it takes their local tensors."""

    def call(*args: Any) -> Any:
        local = list(args)
        for i in indices:
            local[i] = local_tensor(local[i])
        return compiled(*local)

    return torch._dynamo.disable(call, reason="intscale takes the local tensors of DTensors")
