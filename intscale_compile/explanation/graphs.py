"""The graph of every layer before and after each pass, as lines of Python; layers that are alike are kept once.

A node belongs to the repeated layer that Dynamo's ``nn_module_stack`` names for it; one without a stack to its neighbours.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..integrations.torch import source_of
from ..passes import GraphRewrite
from .blocks import TensorNames, block_of, dotted
from .node_text import expression, kind
from .records import GraphPart

CLEANUP = "remove unused nodes"  # what apply_passes does after the last pass
_OUTSIDE = re.compile("\0(\\d+)\0")  # a value of another part: its number in order of use, since its name varies


class GraphRecorder:
    """Observer of ``apply_passes``: keeps the text of each part of one graph in each stage.

    Args:
        number: of the graph, from 1.
        names: of the model's parameters.
        blocks: dotted names of the model's repeated layers.
    """

    def __init__(self, number: int, names: TensorNames, blocks: Sequence[str]):
        self._number = number
        self._names = names
        self._blocks = frozenset(blocks)
        self._stages: list[tuple[str, dict[str, tuple[str, ...]]]] = []
        self._local: dict[tuple[str, fx.Node], str] = {}
        self._used: dict[str, Counter] = {}
        self._outside: dict[str, dict[fx.Node, int]] = {}
        self._root = ""

    def __call__(self, stage: str, rewrite: GraphRewrite) -> None:
        """Keep the graph as it is after a stage."""
        if not self._stages:
            self._root = self._find_root(rewrite)
        if self._stages and rewrite.counts.get(stage) == 0:
            self._stages.append((stage, self._stages[-1][1]))
        else:
            self._stages.append((stage, self._render(rewrite)))

    def finish(self, rewrite: GraphRewrite) -> list[GraphPart]:
        """The parts of the graph, after unused nodes were removed."""
        last = self._render(rewrite)
        if last != self._stages[-1][1]:
            self._stages.append((CLEANUP, last))
        alike: dict[tuple, list[str]] = {}
        for part in dict.fromkeys(name for _, stage in self._stages for name in stage):
            alike.setdefault((bool(part), self._texts(part)), []).append(part)
        return [
            GraphPart(self._number, parts[0], tuple(parts), tuple((s, self._shown(parts[0], t)) for s, t in texts))
            for (_, texts), parts in alike.items()
        ]

    def _texts(self, part: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple((stage, lines.get(part, ())) for stage, lines in self._stages)

    def _shown(self, part: str, lines: Sequence[str]) -> tuple[str, ...]:
        """Lines with the names of values of other parts in place of their numbers."""
        taken = set(self._used.get(part, ()))
        shown: dict[int, str] = {}
        for node, number in self._outside.get(part, {}).items():
            name = base = re.sub(r"^l_(?:inputs|kwargs|args)_(.*?)_?$", r"input_\1", node.name).rstrip("_")
            while name in taken:
                base, name = base + "_", base + "_in"
            taken.add(name)
            shown[number] = name
        return tuple(_OUTSIDE.sub(lambda found: shown[int(found[1])], line) for line in lines)

    def _find_root(self, rewrite: GraphRewrite) -> str:
        """Dotted name of the module that the graph's own names start from: not the model's where a graph broke."""
        for node, index in rewrite.input_index.items():
            local = dotted(source_of(node))
            full = self._names(rewrite.example_inputs[index], "")
            if local and full.endswith("." + local):
                return full[: -len(local) - 1]
            if full:
                return ""
        return ""

    def _render(self, rewrite: GraphRewrite) -> dict[str, tuple[str, ...]]:
        nodes = [n for n in rewrite.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        where = self._parts(nodes)
        lines: dict[str, list[str]] = {}
        leaving: dict[str, list[str]] = {}
        for node in nodes:
            part = where[node]
            text = expression(node, functools.partial(self._input, rewrite, where, part))
            line = f"{self._name(part, node)} = {text}"
            lines.setdefault(part, []).append(f"{line}  # {kind(node)}" if kind(node) else line)
            if any(where.get(user) != part for user in node.users):
                leaving.setdefault(part, []).append(self._name(part, node))
        return {part: (*body, f"return {', '.join(leaving.get(part, []))}".rstrip()) for part, body in lines.items()}

    def _parts(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
        """The block of each node; those without a module belong where both their neighbours do."""
        own = [self._own_part(node) for node in nodes]
        after = own[:]
        for i in reversed(range(len(own) - 1)):
            after[i] = after[i + 1] if own[i] is None else own[i]
        where: dict[fx.Node, str] = {}
        before: Any = None
        for i, node in enumerate(nodes):
            before = own[i] if own[i] is not None else before
            if own[i] is not None:
                where[node] = own[i]  # type: ignore[assignment]
            elif before is None or after[i] is None:
                where[node] = block_of(self._root, self._blocks) or before or after[i] or ""
            else:
                where[node] = before if before == after[i] else ""
        return where

    def _own_part(self, node: fx.Node) -> Any:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return None
        inside = dotted(str(list(stack.values())[-1][0]))
        return block_of(".".join(filter(None, (self._root, inside))), self._blocks)

    def _name(self, part: str, node: fx.Node) -> str:
        """What a node is called in its part: numbered within it, so that parts alike have equal texts."""
        key = (part, node)
        if key not in self._local:
            base = re.sub(r"_\d+$", "", node.name).removesuffix("_default")
            used = self._used.setdefault(part, Counter())
            name = base if not used[base] else f"{base}_{used[base]}"
            used[base] += 1
            self._local[key] = name
        return self._local[key]

    def _input(self, rewrite: GraphRewrite, where: dict[fx.Node, str], part: str, node: fx.Node) -> str:
        if where.get(node) == part:
            return self._name(part, node)
        self._used.setdefault(part, Counter())
        weight = self._weight_name(rewrite, node)
        if weight:
            return weight.removeprefix(part + ".") if part else weight
        outside = self._outside.setdefault(part, {})
        return f"\0{outside.setdefault(node, len(outside))}\0"

    def _weight_name(self, rewrite: GraphRewrite, node: fx.Node) -> str:
        if node in rewrite.packed_inputs:
            recipe, data = rewrite.packed_inputs[node]
            names = [self._names(source.tensor(rewrite.example_inputs), source.name) for source in recipe.sources]
            return f"{together(names)}.{data}" if data else together(names)
        if node.op == "get_attr":
            return str(node.target)
        index = rewrite.input_index.get(node)
        return "" if index is None else self._names(rewrite.example_inputs[index], "")


def together(names: Sequence[str]) -> str:
    """``attn.{q,k,v}.weight`` for ``attn.q.weight``, ``attn.k.weight``, ``attn.v.weight``."""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    head = 0
    while all(len(s) > head + 1 and s[head] == split[0][head] for s in split):
        head += 1
    tail = 0
    while all(len(s) > head + tail + 1 and s[-1 - tail] == split[0][-1 - tail] for s in split):
        tail += 1
    middle = "{" + ",".join(".".join(s[head : len(s) - tail]) for s in split) + "}"
    return ".".join([*split[0][:head], middle, *split[0][len(split[0]) - tail :]])
