"""Progress of a ``quantize_`` call that takes longer than a moment, and its summary in the log; what compilations are for."""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, Optional

log = logging.getLogger("intscale_compile")
SILENT_SECONDS = 2.0  # a call that is faster shows nothing
LOG_SECONDS = 5.0  # between two log lines, where there is no terminal to draw a bar on
WORK: ContextVar[str] = ContextVar(
    "intscale_work", default=""
)  # what a compilation that begins now is for, if that is known


class Progress:
    """Counts the weights of one ``quantize_`` call: a bar on a terminal or in a notebook, log lines elsewhere.

    Args:
        weights: how many there are.
        nbytes: bytes of all of them in their original precision.
    """

    def __init__(self, weights: int, nbytes: int):
        self._weights, self._bytes = weights, nbytes
        self._done = self._before = self._after = 0
        self._start = self._said = time.monotonic()
        self._bar: Any = None

    def add(self, name: str, before: int, after: int) -> None:
        """One weight is done: its name, and its bytes before and after."""
        self._done, self._before, self._after = self._done + 1, self._before + before, self._after + after
        now = time.monotonic()
        if self._done >= self._weights:
            self.close()
            log.info(
                "quantize_: %d weights, %s to %s, %.1f s",
                *(self._done, _size(self._before), _size(self._after), now - self._start),
            )
        elif self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update(before)
        elif now - self._start > SILENT_SECONDS:
            self._bar = _bar(self._bytes, self._before)
            if self._bar is None and now - self._said > LOG_SECONDS:
                self._said = now
                log.info(
                    "quantize_: %d of %d weights, %s of %s, last %s",
                    *(self._done, self._weights, _size(self._before), _size(self._bytes), name),
                )

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __del__(self) -> None:  # the call ended in an error that was not ours
        self.close()


def _bar(total: int, done: int) -> Optional[Any]:
    """A tqdm bar over bytes, or None where nobody would see it or tqdm is not installed (it comes with transformers)."""
    if not (sys.stderr is not None and sys.stderr.isatty()) and "ipykernel" not in sys.modules:
        return None
    try:
        # Comes with transformers.
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, desc="quantize_", unit="B", unit_scale=True, leave=False)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**8 else f"{nbytes / 1e6:.1f} MB"


def block_bar(title: str, blocks: int, shown: bool) -> Any:
    """A bar over the blocks of a model, for a ``with`` statement."""
    # Comes with transformers.
    from tqdm.auto import tqdm

    return tqdm(total=blocks, desc=title, unit="block", disable=None if shown else True, leave=False)
