"""Strides of a graph before and after passes, from running both."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from intscale_compile.passes import PASSES, GraphRewrite, apply_passes
from intscale_compile.passes.layout import READS_LAYOUT, same_layout
from tests.support.graphs import arguments, capture


def memory(value) -> set[int]:
    """The storages behind a value."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}


def values_of(rewrite: GraphRewrite) -> dict[fx.Node, object]:
    """What every node gives when the graph runs."""
    values = {}

    class Record(fx.Interpreter):
        def run_node(self, node):
            values[node] = super().run_node(node)
            return values[node]

    with torch.no_grad():
        Record(rewrite.gm).run(*arguments(rewrite))
    return values


def checked_rewrite(model, *inputs, passes=PASSES, dynamic=None, **options) -> tuple[GraphRewrite, tuple, tuple]:
    """Run passes; values that outlive them, or that others stand for, keep their strides where a reader looks at them.

    Returns:
        The rewritten graph, and the results of the graph before and after.
    """
    rewrite = capture(model, *inputs, dynamic=dynamic, **options)
    before = values_of(rewrite)
    results = next(values for node, values in before.items() if node.op == "output")
    stands_for: dict[fx.Node, fx.Node] = {}
    replace = fx.Node.replace_all_uses_with

    def noted(self, other, *args, **kwargs):
        stands_for[other] = stands_for.get(self, self)
        return replace(self, other, *args, **kwargs)

    fx.Node.replace_all_uses_with = noted
    try:
        apply_passes(rewrite, passes)
    finally:
        fx.Node.replace_all_uses_with = replace
    after = values_of(rewrite)
    for node, value in after.items():
        old = before.get(stands_for.get(node, node))
        if isinstance(value, Tensor) and isinstance(old, Tensor) and not same_layout(old, value):
            for reader in node.users:
                name = reader.target if isinstance(reader.target, str) else getattr(reader.target, "__name__", "")
                assert reader.op != "output" and name not in READS_LAYOUT, f"{reader.format_node()}: strides of {node}"
    found = next(values for node, values in after.items() if node.op == "output")
    for one, other in zip(results, found):
        assert not isinstance(one, Tensor) or same_layout(one, other), (one.stride(), other.stride())
    return rewrite, results, found
