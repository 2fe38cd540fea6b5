"""When Dynamo compiles, and how many kernels Inductor has compiled: for a display of progress, which nothing depends on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .registry import PrivateName

_NO_PROGRESS = "progress of compilations begins when Dynamo is done, or is not shown"
HANDLER = PrivateName("torch._dynamo.callback:callback_handler", "showing that a compilation goes on", _NO_PROGRESS)
BAR = PrivateName("torch._inductor.async_compile:tqdm", "counting compiled kernels", "they are not counted")
_RECORDING = "CUDAGRAPH_RECORDING"
_installed: list[Callable[[Any], None]] = []  # our callbacks at the start and at the end, once they are made


def watch_compilations(begin: Callable[[bool], None], end: Callable[[], None]) -> None:
    """Have ``begin`` called when a compilation starts, with whether it is a recording of CUDA graphs, and ``end`` when the
    outermost one ends. Idempotent; ``torch._dynamo.reset()`` removes both.
    """
    handler = HANDLER.find()
    if handler is None:
        return
    if not _installed:
        _installed.append(lambda args: begin(getattr(args.callback_trigger, "name", "") == _RECORDING))
        _installed.append(lambda args: end())
    start, stop = _installed
    if start not in handler.start_callbacks:
        handler.register_start_callback(start)
    if stop not in handler.end_callbacks:
        handler.register_end_callback(stop)


@contextlib.contextmanager
def counting_kernels(report: Callable[[int, int], None]) -> Iterator[None]:
    """Call ``report(done, total)`` in this context whenever Inductor has another kernel of a graph ready."""
    bar = BAR.find()
    if bar is None:
        yield
        return
    module = sys.modules[BAR.target.partition(":")[0]]

    def counting(*args: Any, total: int = 0, **kwargs: Any) -> Any:
        made, done = bar(*args, total=total, **kwargs), [0]
        update = made.update
        report(0, total)

        def counted(n: int = 1) -> Any:
            done[0] += n
            report(done[0], total)
            return update(n)

        made.update = counted
        return made

    module.tqdm = counting  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.tqdm = bar  # type: ignore[attr-defined]
