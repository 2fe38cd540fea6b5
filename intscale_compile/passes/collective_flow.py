"""Where the tensor of a collective comes from and what reads its result, in a graph of ATen operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

# Operators that multiply matrices, by name: before and after Inductor's decompositions.
PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "matmul", "linear", "_scaled_mm", "_scaled_grouped_mm", "grouped_mm",
    "_grouped_mm", "_int_mm", "einsum", "convolution", "flex_attention",
}  # fmt: skip
ATTENTION = "scaled_dot_product"
# Operators that only rearrange or convert: a sharded weight passes them on its way into an all-gather.
REARRANGING = {
    "view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice",
    "narrow", "select", "split", "split_with_sizes", "chunk", "getitem", "cat", "constant_pad_nd", "pad", "clone",
    "contiguous", "alias", "detach", "to", "_to_copy", "convert_element_type", "as_strided", "slice_scatter",
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """``"mm"`` for ``aten.mm.default``; the name of a function."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies matrices, in high precision or quantized; what quantizes an activation counts too."""
    name = op_name(node)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "intscale":
        return not name.startswith(("quantized_all", "quantized_reduce", "planned_all")) and not name.endswith(
            "_by_size"
        )
    return name in PRODUCTS or ATTENTION in name


def reaches_product(nodes: Sequence[fx.Node]) -> bool:
    """Whether a matrix product reads one of ``nodes``, at the end of a path of floating-point (or int8) tensors."""
    stack, seen = list(nodes), set(nodes)
    while stack:
        for user in stack.pop().users:
            if is_product(user):
                return True
            if user not in seen and not _is_index(user):
                seen.add(user)
                stack.append(user)
    return False


def _is_index(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of indices or flags (argmax, comparison), where an activation ends."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.int8


def gathers_input(x: fx.Node) -> bool:
    """Whether ``x`` holds nothing but inputs of the graph, rearranged or converted."""
    stack, seen = [x], {x}
    while stack:
        node = stack.pop()
        if node.op not in ("placeholder", "get_attr") and op_name(node) not in REARRANGING:
            return False
        stack += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return True


def is_backward(graph: fx.Graph) -> bool:
    """Whether AOTAutograd made the graph for gradients: it names their inputs ``tangents``."""
    return any(node.op == "placeholder" and node.name.startswith("tangents") for node in graph.nodes)
