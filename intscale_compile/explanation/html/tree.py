"""The model as a tree with the decision for each weight; repeated layers that are alike are shown once."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from ..blocks import block_of
from ..folding import Fold, fold
from ..records import Records
from ..text import size_of
from .tables import badge

MOST_OPEN = 40  # lines


@dataclass
class Branch:
    """A module: the modules inside of it, and the weights that it holds itself."""

    inside: dict[str, Branch] = field(default_factory=dict)
    weights: list[Fold] = field(default_factory=list)

    def all(self) -> list[Fold]:
        """Its weights and those inside."""
        return self.weights + [one for branch in self.inside.values() for one in branch.all()]


def model_tree(report: Records) -> str:
    """Nested ``<details>``; all of them open where they are few."""
    folds = fold(report.layers, report.blocks, least=2)
    known = frozenset(report.blocks)
    root, labels = Branch(), {}
    for one in folds:
        name = one.layers[0].name
        block = block_of(name, known)
        if len(one.layers) > 1:
            labels[block] = one.name[: len(one.name) - len(name) + len(block)]
        branch = root
        for part in name.split(".")[:-1]:
            branch = branch.inside.setdefault(part, Branch())
        branch.weights.append(one)
    return f'<div class="tree">{_branch(report, labels, "", root, len(folds) <= MOST_OPEN)}</div>'


def _branch(report: Records, labels: dict[str, str], path: str, branch: Branch, opened: bool) -> str:
    if not branch.inside and len(branch.weights) == 1:
        return _line(path.rpartition(".")[2] or branch.weights[0].name, report.modules.get(path, ""), branch.weights[0])
    folds = branch.all()
    stack, _, leaf = path.rpartition(".")
    label = labels[path][len(stack) :].lstrip(".") if path in labels else leaf
    alike = f", {len(folds[0].layers)} alike: {len(folds)} weights each" if path in labels else ""
    done = sum(len(one.layers) for one in folds if one.layers[0].quantized)
    count = sum(len(one.layers) for one in folds)
    body = "".join(_line(one.name.rpartition(".")[2], "", one) for one in branch.weights)
    for name, inner in branch.inside.items():
        body += _branch(report, labels, f"{path}.{name}" if path else name, inner, opened)
    kind = report.modules.get(path, "")
    words = f"{kind if label else ''}{alike}; {done} of {count} quantized".lstrip("; ")
    return (
        f"<details{' open' if opened or path.count('.') < 2 else ''}><summary>{escape(label or kind)} "
        f'<span class="dim">{escape(words)}</span></summary>{body}</details>'
    )


def _line(name: str, kind: str, one: Fold) -> str:
    layer = one.layers[0]
    words = f"{kind} {size_of(one)}".strip() + (f", {layer.kernel}" if layer.kernel else "")
    mark = badge(layer.quantized, layer.decision, layer.explanation)
    return f'<div class="leaf">{escape(name)} {mark} <span class="dim">{escape(words)}</span></div>'
