"""Which functions TorchDynamo left to Python without making a graph of them, and why.

Where a graph breaks before its first operator, or a whole function is skipped, no backend is called, so that nothing says so.
Dynamo's own record of each function that it tried does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchao

from .registry import PrivateName

_UNSAID = "explain does not say which functions Dynamo left to Python"
_RECORD = PrivateName("torch._dynamo.utils:get_compilation_metrics", "functions that Dynamo left to Python", _UNSAID)
_LIMIT = PrivateName(
    "torch._dynamo.utils:set_compilation_metrics_limit",
    "keeping Dynamo's record of many functions",
    _UNSAID,
    ("new_size",),
)
_KEPT = PrivateName("torch._dynamo.utils:_compilation_metrics.maxlen", "the limit as it was", _UNSAID)
MOST_FRAMES = 4096  # that are kept while somebody listens; Dynamo keeps 64
_LIBRARIES = tuple(str(Path(package.__file__).parent) for package in (torch, torchao))  # type: ignore[arg-type]
_OURS = str(Path(__file__).parents[1])


class LeftFrame(NamedTuple):
    """A function that runs in Python: the place (empty where it is the call of the model itself), and the first line of why."""

    place: str
    reason: str


@contextmanager
def left_frames() -> Iterator[list[LeftFrame]]:
    """Fills the list that it yields, at the end, with the functions that Dynamo left to Python meanwhile."""
    found: list[LeftFrame] = []
    record, set_limit, limit = _RECORD.find(), _LIMIT.find(), _KEPT.find()
    if record is None or set_limit is None or limit is None:
        yield found
        return
    before = {id(entry): entry for entry in record()}
    set_limit(MOST_FRAMES)
    try:
        yield found
    finally:
        entries = [entry for entry in record() if id(entry) not in before]
        set_limit(limit)
        found += dict.fromkeys(frame for entry in entries for frame in _frames(entry))


def _frames(entry: Any) -> Iterator[LeftFrame]:
    file = str(getattr(entry, "co_filename", None) or "")
    if file.startswith(_LIBRARIES) or (file.startswith(_OURS) and not file.endswith("captured.py")):
        return
    line = getattr(entry, "fail_user_frame_lineno", None) or getattr(entry, "co_firstlineno", None)
    place = "" if file.startswith(_OURS) else f"{file}:{line} in {entry.co_name}"
    failed = getattr(entry, "fail_reason", None) if getattr(entry, "fail_type", None) else None
    if failed:
        yield LeftFrame(place, _first_line(failed))
    elif not getattr(entry, "graph_op_count", 0):  # it broke before its first operator
        for reason in sorted(getattr(entry, "restart_reasons", None) or ()):
            yield LeftFrame(place, _first_line(reason))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
