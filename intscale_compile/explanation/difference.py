"""``explain.diff``: what differs between two explanations, of two configurations, versions or models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from ..errors import InputError
from .changes import Change, Changes
from .html import difference_page
from .records import SCHEMA
from .report import Explanation

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


@dataclass(frozen=True)
class Difference(Changes):
    """The result of :func:`diff`; ``print`` it. False where nothing differs. Its fields are those of ``Changes``."""

    def to_html(self, path: Optional[Union[str, Path]] = None) -> str:
        """One page that needs nothing else. Returns it; writes it to ``path`` where given."""
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
