"""Strides: what a pass emits has those of what it replaces, or every reader up to the next copy is known not to care.

Dynamo records a graph with the strides of the original values: ``as_strided`` with numbers made of them, ``view`` where they
allow it, a branch that asked ``is_contiguous()``. A value with other strides may only take the place of the original where no
reader looks at more than its elements. :func:`values_with` finds that out: each reader is run on fake tensors with the new
strides, on through views and through whatever passes strides on, until the results are laid out as before.

Known not to care are functions and methods of PyTorch other than :data:`READS_LAYOUT`, and our own operators. Not known, so
that the pass declines or copies: results of the graph, operators of other libraries, higher-order operators, calls of modules.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from .base import EXAMPLE, QUANTIZATION_NAMESPACE, GraphRewrite, example

READS_LAYOUT = {
    "as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "stride", "storage_offset", "is_contiguous",
    "is_non_overlapping_and_dense", "data_ptr", "storage", "untyped_storage", "set_", "resize_", "resize_as_", "numpy",
    "dim_order", "is_set_to", "from_dlpack", "to_dlpack", "__dlpack__", "sym_stride", "sym_storage_offset",
}  # fmt: skip
IDLE = ("dropout", "dropout_", "dropout.default")
NAMESPACES = {"aten", "prims", QUANTIZATION_NAMESPACE}


def same_layout(first: Any, second: Any) -> bool:
    """Whether two values have equal strides in every dimension of more than one element; tuples entry by entry."""
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(same_layout, first, second))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return isinstance(first, Tensor) == isinstance(second, Tensor)
    return first.dim() == second.dim() and _equal_strides(first.shape, first.stride(), second.stride())


def is_contiguous(value: Tensor) -> bool:
    """Whether a value has the strides of a new tensor, as the results of our operators have."""
    strides: list[Any] = [1]
    for size in reversed(value.shape[1:]):
        strides.insert(0, strides[0] * size)
    return _equal_strides(value.shape, value.stride(), strides[: value.dim()])


def _equal_strides(sizes: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> bool:
    return all(
        statically_known_true(size == 1) or statically_known_true(one == two)
        for size, one, two in zip(sizes, first, second)
    )


Values = dict[fx.Node, Any]


def values_if_contiguous(rewrite: GraphRewrite, node: fx.Node) -> Optional[Values]:
    """:func:`values_with` for a contiguous result in the place of ``node``."""
    value = example(node)
    if rewrite.fake_mode is None or not isinstance(value, Tensor) or is_contiguous(value):
        return {}
    with rewrite.fake_mode, torch.no_grad():
        return values_with(rewrite, node, torch.empty(value.shape, dtype=value.dtype, device=value.device))


def values_with(rewrite: GraphRewrite, node: fx.Node, value: Any) -> Optional[Values]:
    """What ``node`` and its readers hold if ``node`` holds ``value``; None where a reader may look at the strides.

    Args:
        value: a fake tensor with the shape and dtype of the old one. It may be a slice of a larger one.

    Returns:
        Fake tensors of the nodes whose value changes, for :func:`take` once the pass has made the change.
    """
    if rewrite.fake_mode is None:
        return {}
    values: Values = {}
    return values if _follow(rewrite, node, value, values) else None


def take(rewrite: GraphRewrite, node: fx.Node, values: Values) -> None:
    """Set the examples of the readers to what :func:`values_with` gave; ``node`` is skipped, it is replaced."""
    for reader, value in values.items():
        if reader is not node:
            reader.meta[EXAMPLE] = value


def _follow(rewrite: GraphRewrite, node: fx.Node, value: Any, values: Values) -> bool:
    values[node] = value
    memory = _memory(value)
    for reader in node.users:
        if not _is_known(reader):
            return False
        old = example(reader)
        if old is None or _depends_on_data(old):  # nothing, or a new tensor of unknown size
            continue
        result = computed(rewrite, reader, values)
        if result is None:
            return False
        if same_layout(old, result) and memory.isdisjoint(_memory(result)):
            continue
        if not _follow(rewrite, reader, result, values):
            return False
    return True


def _is_known(reader: fx.Node) -> bool:
    """Whether a reader looks at elements only, whatever the strides of its operands."""
    target = reader.target
    if reader.op == "call_method":
        return target not in READS_LAYOUT
    if reader.op != "call_function" or "out" in reader.kwargs or isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in NAMESPACES and target._schema.name.partition("::")[2] not in READS_LAYOUT
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
    of_torch = module.partition(".")[0] in ("torch", "_operator", "builtins", "math") or _is_builtin_of_torch(target)
    return of_torch and name not in READS_LAYOUT


def _is_builtin_of_torch(target: Any) -> bool:
    """``torch.add`` and the like are built-in methods of a type or of ``torch._C._nn`` and have no module of their own."""
    name = getattr(target, "__name__", "")
    owners = (torch, torch._C._nn, torch.Tensor, torch.nn.functional, operator)
    return any(getattr(owner, name, None) is target for owner in owners)


def computed(rewrite: GraphRewrite, reader: fx.Node, values: Values) -> Any:
    """The fake result of a node with the values of others as in ``values``; None where their strides do not allow it."""
    inputs = {node: values.get(node, example(node)) for node in reader.all_input_nodes}
    if any(value is None for value in inputs.values()):
        return None
    args, kwargs = fx.map_arg((reader.args, reader.kwargs), inputs.__getitem__)
    if _is_idle_dropout(reader):
        return (*args, kwargs.get("input"))[0]
    try:
        with rewrite.fake_mode, torch.no_grad(), enable_python_dispatcher():
            if reader.op == "call_method":
                return getattr(args[0], str(reader.target))(*args[1:], **kwargs)
            return reader.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError):  # a view that these strides do not allow
        return None


def _is_idle_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout that returns its input itself: PyTorch's decomposition for fake tensors makes a copy."""
    if node.op == "call_method" or getattr(node.target, "__name__", "") not in IDLE:
        return False
    given: dict[str, Any] = dict(zip(("input", "p", "training"), node.args), **node.kwargs)
    given.setdefault("training", given.get("train", True))
    return given["training"] is False or bool(given.get("p", 0.5) == 0)


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(value: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in _leaves(value)}


def _depends_on_data(value: Any) -> bool:
    """Whether a size is one that only the values decide: to compute it again would make another symbol."""
    parts = torch.utils._pytree.tree_leaves(value)
    return any(
        isinstance(p, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) and free_unbacked_symbols(p) for p in parts
    )
