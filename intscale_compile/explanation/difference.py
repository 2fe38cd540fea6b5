"""``explain.diff``: what differs between two explanations, of two configurations, versions or models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from ..errors import InputError
from .folding import joined
from .report import SCHEMA, Explanation, _lists

COMPARED = (
    "decision",
    "shape",
    "tokens",
    "activation",
    "group_size",
    "kernel",
    "scales",
    "headroom",
    "bytes",
    "gemm with",
)
TOTALS = (
    "graphs", "gemms", "activation_quantizations", "parameters", "quantized_parameters", "bytes_before", "bytes_after",
    "device",
)  # fmt: skip


class Change(NamedTuple):
    """One value that differs; ``None`` where one side has no such entry."""

    name: str
    what: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Difference:
    """The result of :func:`diff`; ``print`` it. False where nothing differs.

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
        return {"schema": SCHEMA, **_lists(data)}

    def to_html(self, path: Optional[Union[str, Path]] = None) -> str:
        """One page that needs nothing else. Returns it; writes it to ``path`` where given."""
        from .html import difference_page

        text = difference_page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def diff(a: Union[Explanation, dict], b: Union[Explanation, dict]) -> Difference:
    """What changed from ``a`` to ``b``.

    Args:
        a, b: results of ``explain``, or what their ``to_dict`` returned (read back from JSON).

    Raises:
        InputError: a dictionary is no explanation, or one of another version of the keys.
    """
    old, new = (_as_dict(side, name) for side, name in ((a, "a"), (b, "b")))
    totals = [Change("", key, old[key], new[key]) for key in TOTALS if old[key] != new[key]]
    totals += _entries(old["settings"], new["settings"], "setting ")
    passes = [Change(c.what, "count", c.before, c.after) for c in _entries(old["pass_counts"], new["pass_counts"], "")]
    before, after = _layers(old), _layers(new)
    changes: list[Change] = []
    for name in dict.fromkeys([*before, *after]):
        changes += _layer_changes(name, before.get(name), after.get(name))
    blocks = tuple(dict.fromkeys([*old["blocks"], *new["blocks"]]))
    return Difference(tuple(totals), tuple(passes), tuple(changes), blocks)


def _as_dict(side: Union[Explanation, dict], name: str) -> dict[str, Any]:
    data = side.to_dict() if isinstance(side, Explanation) else side
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(
            f"{name} is not an Explanation or what its to_dict() returns (schema {SCHEMA}): pass what explain returned."
        )
    return data


def _entries(old: dict, new: dict, prefix: str) -> list[Change]:
    keys = dict.fromkeys([*old, *new])
    return [Change("", prefix + key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _layers(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is compared of each layer, by name; a layer that is called again gets a number."""
    members = {gemm["number"]: gemm["layers"] for gemm in data["gemm_reports"]}
    found: dict[str, dict[str, Any]] = {}
    for layer in data["layers"]:
        name, times = layer["name"], 1
        while name in found:
            times += 1
            name = f"{layer['name']} (call {times})"
        found[name] = _values(layer, members)
    return found


def _values(layer: dict[str, Any], members: dict[int, list[str]]) -> dict[str, Any]:
    decision = (
        f"W{layer['weight_bits']}A8" + " asymmetric" * layer["asymmetric"] if layer["quantized"] else layer["reason"]
    )
    values = {key: layer[key] for key in ("shape", "tokens", "bytes_before")} | {"decision": decision}
    values |= {"bytes": layer["bytes_after"], "scales": None, "headroom": None, "gemm with": None}
    values |= {key: layer[key] or None for key in ("activation", "kernel", "group_size")}
    if layer["quantized"]:
        values["headroom"] = round(layer["headroom_bits"], 1)
        values["scales"] = layer["scale_counts"]
        others = [name for name in members.get(layer["gemm"], []) if name != layer["name"]]
        values["gemm with"] = sorted(name.removesuffix(".weight").rpartition(".")[2] for name in others) or None
    return values


def _layer_changes(name: str, old: Optional[dict], new: Optional[dict]) -> list[Change]:
    if old is None or new is None:
        return [Change(name, "decision", old and old["decision"], new and new["decision"])]
    compared = COMPARED if (old["kernel"] is None) == (new["kernel"] is None) else ("decision", "bytes")
    return [Change(name, key, old[key], new[key]) for key in compared if old[key] != new[key]]


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
