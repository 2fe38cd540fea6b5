"""``trace_node``: the way of one weight through every pass."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..compile.recorder.compilation import Compilation, Stage, last_compilation
from ..compile.recorder.python_code import statements
from ..compile.recorder.stages import Product, Step
from ..errors import InputError

SPLITS = (torch.split, torch.functional.split)


@dataclass(frozen=True)
class TracedStage:
    """The products with one weight after one pass.

    Attributes:
        name: of the pass.
        changed: whether the lines are others than after the pass before.
        nodes: names of the nodes that compute the products.
        lines: their Python, with what quantizes their operands and what cuts their result out of a merged one.
        gemm: names of the weights in the same product, in row order; one where it is not merged.
        rows: rows of the merged weight that are this one's, as ``(first, behind the last)``.
    """

    name: str
    changed: bool
    nodes: tuple[str, ...]
    lines: tuple[str, ...]
    gemm: tuple[str, ...]
    rows: Optional[tuple[int, int]]


@dataclass(frozen=True)
class NodeTrace:
    """The result of :func:`trace_node`; ``print`` it."""

    name: str
    graph: int
    product: Product
    stages: tuple[TracedStage, ...]

    @property
    def changed_by(self) -> tuple[str, ...]:
        """The passes that changed something."""
        return tuple(stage.name for stage in self.stages[1:] if stage.changed)

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.product.shape)) if self.product.shape else "no matrix"
        lines = [f"{self.name}  (graph {self.graph}, N x K = {shape}, {self.product.tokens} tokens)"]
        if self.product.reason is not None:
            lines.append(f"left alone: {self.product.reason}")
        for stage in self.stages:
            lines.append(f"{stage.name}" + ("" if stage.changed else ": unchanged"))
            if stage.changed and len(stage.gemm) > 1 and stage.rows is not None:
                lines.append(f"    # rows {stage.rows[0]}:{stage.rows[1]} of one GEMM: {' + '.join(stage.gemm)}")
            lines += [f"    {line}" for line in stage.lines if stage.changed]
        return "\n".join(lines)

    __repr__ = __str__


def trace_node(name: str, graph: Optional[int] = None) -> NodeTrace:
    """Show what every pass made of the products with one weight.

    Args:
        name: dotted name of the weight, as ``explain`` shows it, or its last parts: ``layers.0.self_attn.q_proj``.
        graph: number of the compiled graph; the default is the last one with this weight.

    Raises:
        InputError: no graph that was compiled in this process has such a weight, or several weights are called so.
    """
    for compilation in reversed(last_compilation()):
        if graph is None or compilation.number == graph:
            found = _find(name, compilation)
            if found is not None:
                return _trace(compilation, *found)
    where = "no graph of this process" if graph is None else f"not graph {graph}"
    known = sorted({p.name for c in last_compilation() for p in c.products})
    some = f": one of {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}" if known else ": compile a model first"
    raise InputError(f"name={name!r}: {where} has a product with such a weight{some}.")


def _find(name: str, compilation: Compilation) -> Optional[tuple[str, list[int]]]:
    """The full name, and which products of the graph have that weight."""
    names = list(dict.fromkeys(p.name for p in compilation.products))
    for ending in (name, f"{name}.weight"):
        matching = [n for n in names if n == ending] or [n for n in names if n.endswith(f".{ending}")]
        if len(matching) > 1:
            raise InputError(f"name={name!r} fits {len(matching)} weights: say which of {', '.join(matching[:8])}.")
        if matching:
            return matching[0], [i for i, p in enumerate(compilation.products) if p.name == matching[0]]
    return None


def _trace(compilation: Compilation, name: str, indices: list[int]) -> NodeTrace:
    traced: list[TracedStage] = []
    for stage in compilation.stages:
        if traced and not stage.changed:
            before = traced[-1]
            traced.append(TracedStage(stage.name, False, before.nodes, before.lines, before.gemm, before.rows))
        else:
            traced.append(_traced_stage(stage, compilation, indices, traced[-1] if traced else None))
    return NodeTrace(name, compilation.number, compilation.products[indices[0]], tuple(traced))


def _traced_stage(
    stage: Stage, compilation: Compilation, indices: list[int], before: Optional[TracedStage]
) -> TracedStage:
    steps = {step.name: step for step in stage.steps}
    users: dict[str, list[Step]] = {}
    for step in stage.steps:
        for read in step.reads:
            users.setdefault(read, []).append(step)
    nodes: list[str] = []
    shown: set[str] = set()
    gemm: tuple[str, ...] = ()
    rows = None
    for node, parts in stage.products.items():
        mine = [i for i in indices if i in parts]
        if not mine or node not in steps:
            continue
        nodes.append(node)
        shown |= _operands(steps[node], steps) | {node}
        gemm = tuple(compilation.products[i].name for i in parts)
        if len(parts) > 1:
            sizes = [(compilation.products[i].shape or (0, 0))[0] for i in parts]
            place = parts.index(mine[0])
            rows = (sum(sizes[:place]), sum(sizes[: place + 1]))
            shown |= _pieces(node, [parts.index(i) for i in mine], users)
    selected = [step for step in stage.steps if step.name in shown]
    found = statements(selected)
    lines = tuple(found[step.name] for step in selected if step.name in found)
    return TracedStage(stage.name, before is None or lines != before.lines, tuple(nodes), lines, gemm, rows)


def _operands(step: Step, steps: Mapping[str, Step]) -> set[str]:
    """Nodes of intscale behind a product: what quantizes and dequantizes its operands, and packed inputs."""
    found: set[str] = set()
    waiting = [steps[name] for name in step.reads if name in steps]
    while waiting:
        one = waiting.pop()
        source = steps.get(one.reads[0]) if one.target is operator.getitem and one.reads else one
        packed = one.op == "placeholder" and one.name.startswith("intscale_")
        if one.name not in found and (packed or (source is not None and is_ours(source.target))):
            found.add(one.name)
            waiting += [steps[name] for name in one.reads if name in steps]
    return found


def _pieces(node: str, places: list[int], users: Mapping[str, list[Step]]) -> set[str]:
    """The split behind a merged product, and the pieces of it at ``places``."""
    found = set()
    for split in users.get(node, ()):
        if split.target in SPLITS:
            found.add(split.name)
            found |= {u.name for u in users.get(split.name, ()) if u.target is operator.getitem and u.args[1] in places}
    return found


def is_ours(target: Any) -> bool:
    """Whether a node with this target calls one of our ops."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "intscale"
