"""What is being compiled and how far that is, on the terminal, where it takes longer than a moment.

    compiling prompt of 32 tokens: graph 1 (7 linear products, any number of tokens), Inductor, 12 of 40 kernels, 23 s

One line that is rewritten each second and gone in the end. Without a terminal or a notebook the logger ``intscale_compile``
gets it at level INFO now and then. It is off where transformers' or tqdm's progress bars are
(``transformers.utils.logging.disable_progress_bar()``, ``TQDM_DISABLE=1``), and with ``INTSCALE_PROGRESS=0``;
``INTSCALE_PROGRESS=1`` prints lines wherever stderr goes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional

from ..integrations.compile_callbacks import counting_kernels, watch_compilations
from ..passes import GraphRewrite
from ..progress import WORK

log = logging.getLogger("intscale_compile")
VARIABLE = "INTSCALE_PROGRESS"
SILENT_SECONDS = 5.0  # a compilation that is faster shows nothing
DRAW_SECONDS = 1.0
LINE_SECONDS = 15.0  # between two lines where none can be rewritten


class CompileProgress:
    """One compilation after the other; nested ones are parts of the outermost.

    Args:
        clock: seconds.
        threaded: whether a thread calls :meth:`draw` each second; tests call it themselves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, threaded: bool = True):
        self._clock, self._threaded = clock, threaded
        self._lock = threading.Lock()
        self._ended: Optional[threading.Event] = None
        self._start = self._said = 0.0
        self._work = self._graph = self._stage = self._kernels = ""
        self._width = 0

    @property
    def active(self) -> bool:
        """Whether a compilation is under way."""
        return self._ended is not None

    def begin(self, stage: str = "tracing") -> None:
        """A compilation begins."""
        with self._lock:
            self._start = self._said = self._clock()
            self._work, self._graph, self._stage, self._kernels, self._width = WORK.get(), "", stage, "", 0
            self._ended = ended = threading.Event()
        if self._threaded:
            threading.Thread(target=self._draw_until, args=(ended,), name="intscale progress", daemon=True).start()

    def end(self) -> None:
        """It has ended."""
        with self._lock:
            if self._ended is not None:
                self._ended.set()
                self._ended = None
                if self._width:
                    _write("\r" + " " * self._width + "\r")
                    self._width = 0

    def stage(self, text: str, graph: Optional[str] = None) -> None:
        """What is done now, and for which graph."""
        self._stage, self._kernels = text, ""
        self._graph = self._graph if graph is None else graph

    def kernels(self, done: int, total: int) -> None:
        """How many kernels of the graph are compiled."""
        self._kernels = f"{done} of {total} kernels"

    def __str__(self) -> str:
        what = ": ".join(part for part in (self._work, self._graph) if part) or "a graph"
        parts = [f"compiling {what}", self._stage, self._kernels, f"{self._clock() - self._start:.0f} s"]
        return ", ".join(part for part in parts if part)

    def draw(self) -> None:
        """Show it, where it has taken long enough."""
        with self._lock:
            now = self._clock()
            if self._ended is None or now - self._start < SILENT_SECONDS:
                return
            how = way()
            if how == "line":
                text = str(self)
                _write("\r" + text.ljust(self._width))
                self._width = max(self._width, len(text))
            elif how != "off" and (now - self._said >= LINE_SECONDS or self._said == self._start):
                self._said = now
                if how == "lines":
                    _write(f"{self}\n")
                else:
                    log.info("%s", str(self))  # as it is now

    def _draw_until(self, ended: threading.Event) -> None:
        wait = SILENT_SECONDS
        while not ended.wait(wait):
            self.draw()
            wait = DRAW_SECONDS


def way() -> str:
    """How progress is shown: ``"line"``, rewritten on a terminal; ``"lines"`` on stderr; ``"log"``; or ``"off"``."""
    asked = os.environ.get(VARIABLE, "").strip()
    if asked == "0":
        return "off"
    terminal = (sys.stderr is not None and sys.stderr.isatty()) or "ipykernel" in sys.modules
    if asked:
        return "line" if terminal else "lines"
    if os.environ.get("TQDM_DISABLE", "").strip() not in ("", "0") or not _bars_of_transformers():
        return "off"
    return "line" if terminal else "log"


def _bars_of_transformers() -> bool:
    """Whether transformers shows progress bars, if somebody imported it."""
    settings: Any = sys.modules.get("transformers.utils.logging")
    return settings is None or bool(getattr(settings, "is_progress_bar_enabled", lambda: True)())


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        sys.stderr.write(text)
        sys.stderr.flush()


@functools.cache
def progress() -> CompileProgress:
    """That of this process."""
    return CompileProgress()


def watch() -> None:
    """Notice every compilation of Dynamo from now on; ``torch._dynamo.reset()`` undoes it, and the backend does it again."""
    watch_compilations(_begin, _end)


def _begin(recording: bool) -> None:
    progress().begin("recording a CUDA graph" if recording else "tracing")


def _end() -> None:
    progress().end()


@contextlib.contextmanager
def shown(rewrite: GraphRewrite, number: int) -> Iterator[None]:
    """Inductor's part of a compilation of ours; the whole of it where Dynamo did not say that it began."""
    watch()
    known, outer = progress(), progress().active
    if not outer:
        known.begin()
    tokens = {candidate.tokens for candidate in rewrite.candidates}
    one = next(iter(tokens)) if len(tokens) == 1 else ""
    size = f"{one} token{'s' * (one != '1')} a call" if one.isdigit() else "any number of tokens"
    known.stage("Inductor", f"graph {number} ({len(rewrite.candidates)} linear products, {size})")
    try:
        with counting_kernels(known.kernels):
            yield
    finally:
        known.stage("the rest")
        if not outer:
            known.end()
