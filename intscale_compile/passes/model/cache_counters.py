"""Cache counters: the lengths that a static cache keeps, one tensor for each layer, are advanced together.

    length_0.add_(1); ...; length_31.add_(1)
    =>  torch._foreach_add_([length_0, ..., length_31], 1)      # at the end of the graph, one kernel

Matches in-place additions of a constant to integer inputs of one element, at least two of them. Left alone where anything
reads the new value in this graph, where two inputs share memory, and where the result itself is used. Each addition is a
kernel of its own otherwise: 32 of the 352 launches of a decoding step of Llama-3-8B.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ..base import GraphRewrite, Pass, example

ADDITIONS = ("add_", operator.iadd, torch.Tensor.add_)


def cache_counters(rewrite: GraphRewrite) -> int:
    """Gather every match; returns how many additions."""
    order = {node: i for i, node in enumerate(rewrite.graph.nodes)}
    readers = _readers_of_memory(rewrite)
    together: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in rewrite.graph.nodes:
        if _advances_a_counter(node) and all(
            order[r] <= order[node] or r.op == "output" for r in readers[_memory(node)]
        ):
            counter = example(node.args[0])
            together[counter.device, counter.dtype, node.args[1]].append(node)
    done = 0
    output = list(rewrite.graph.nodes)[-1]
    for (*_, amount), nodes in together.items():
        if len(nodes) < 2:
            continue
        with rewrite.graph.inserting_before(output):
            counters = [node.args[0] for node in nodes]
            rewrite.call(torch._foreach_add_, (counters, amount), like=nodes[-1])
        for node in nodes:
            rewrite.graph.erase_node(node)
        done += len(nodes)
    return done


CACHE_COUNTERS = Pass("cache_counters", cache_counters)


def _advances_a_counter(node: fx.Node) -> bool:
    if node.target not in ADDITIONS or node.users or node.kwargs or len(node.args) != 2:
        return False
    counter, amount = node.args
    value = example(counter)
    return (
        isinstance(counter, fx.Node)
        and counter.op == "placeholder"
        and type(amount) is int
        and isinstance(value, FakeTensor)
        and value.numel() == 1
        and value.dtype in (torch.int32, torch.int64)
    )


def _memory(node: fx.Node) -> int:
    return example(node.args[0]).untyped_storage()._cdata


def _readers_of_memory(rewrite: GraphRewrite) -> dict[int, list[fx.Node]]:
    """By storage: every node that takes a tensor in it, through whatever view and whichever input.

    An input whose storage another one has too counts as read to the end.
    """
    readers: dict[int, list[fx.Node]] = defaultdict(list)
    inputs: dict[int, fx.Node] = {}
    nodes = list(rewrite.graph.nodes)
    for node in nodes:
        value = example(node)
        if not isinstance(value, FakeTensor):
            continue
        memory = value.untyped_storage()._cdata
        readers[memory].extend(node.users)
        if node.op == "placeholder" and inputs.setdefault(memory, node) is not node:
            readers[memory].append(nodes[-2])
    return readers
