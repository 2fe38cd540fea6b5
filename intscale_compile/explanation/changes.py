"""The values that differ between two explanations, and how they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .folding import joined
from .records import SCHEMA, lists


class Change(NamedTuple):
    """One value that differs; ``None`` where one side has no such entry."""

    name: str
    what: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Changes:
    """What differs between two explanations. False where nothing does.

    Attributes:
        totals: of the model and the graphs, and the settings.
        passes: how often each pass matched.
        layers: of single layers: decision, kernel, bytes, group scales, and which layers share a GEMM.
        blocks: names of the repeated layers of both, for folding.
    """

    totals: tuple[Change, ...]
    passes: tuple[Change, ...]
    layers: tuple[Change, ...]
    blocks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.totals or self.passes or self.layers)

    def folded(self) -> list[Change]:
        """Changes of layers, those that repeated layers share as one; group scales and headroom of these put together."""
        groups: dict[tuple, list[tuple[str, Change]]] = {}
        for change in self.layers:
            block = next((b for b in self.blocks if change.name.startswith(b + ".")), "")
            stack, leaf = block.rpartition(".")[0], change.name[len(block) :]
            values = () if change.what in TOGETHER else (repr(change.before), repr(change.after))
            groups.setdefault((stack, bool(block), leaf, change.what, *values), []).append((block, change))
        folded = [_fold(members) for members in groups.values()]
        return [change for change in folded if change.before != change.after]

    def __str__(self) -> str:
        if not self:
            return "nothing differs."
        lines = [f"{change.what}: {show(change.before)} -> {show(change.after)}" for change in self.totals]
        lines += [f"pass {change.name}: {show(change.before)} -> {show(change.after)}" for change in self.passes]
        rows = [(c.name, c.what, f"{show(c.before)} -> {show(c.after)}") for c in self.folded()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines += [f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in rows]
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serializable data."""
        data = asdict(self)
        for key in ("totals", "passes", "layers"):
            data[key] = [change._asdict() for change in getattr(self, key)]
        return {"schema": SCHEMA, **lists(data)}


def _fold(members: Sequence[tuple[str, Change]]) -> Change:
    block, change = members[0]
    if not block or len(members) == 1:
        return change
    change = change._replace(name=joined([block for block, _ in members]) + change.name[len(block) :])
    put_together = TOGETHER.get(change.what)
    if put_together is None:
        return change
    return change._replace(
        before=put_together([c.before for _, c in members]), after=put_together([c.after for _, c in members])
    )


def _counts_of_all(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    keys = sorted({key for one in counts for key in one}, key=int)
    return {key: sum(one.get(key, 0) for one in counts) for key in keys}


# What repeated layers have each of their own: shown for all of them at once.
TOGETHER: dict[str, Callable[[Sequence[Any]], Any]] = {"scales": _counts_of_all, "headroom": min}


def show(value: Any) -> str:
    """A value for a reader."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):  # groups by scale
        scales = sorted(map(int, value))
        mean = sum(int(scale) * count for scale, count in value.items()) / sum(value.values())
        return f"{scales[0]}..{scales[-1]}, mean {mean:.2f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
