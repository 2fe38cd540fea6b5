"""How long each compiled graph took: our passes one by one, and Inductor."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from .compile_ahead import Ahead

log = logging.getLogger("intscale_compile")
KEPT = 1000  # graphs; a process that recompiles for ever must not grow


@dataclass(frozen=True)
class CompileTime:
    """What one graph took to compile.

    Attributes:
        graph: number of the graph in this process, from 1.
        linears: linear products that run as W4A8.
        passes: seconds by pass, in order; quantizing plain weights counts for ``insert_qdq``.
        inductor: seconds in AOTAutograd and Inductor; what it compiles later (a backward graph) is not in it.
        cached: whether Inductor took the graph from its cache.
        kernels: kernels of ours that another process began to compile meanwhile, see ``compile_ahead``.
        ready: of those, the ones that were ready in time.
        ahead: seconds until the last of them was.
    """

    graph: int
    linears: int
    passes: Mapping[str, float]
    inductor: float
    cached: bool
    kernels: int = 0
    ready: int = 0
    ahead: float = 0.0

    @property
    def rewriting(self) -> float:
        """Seconds of all passes together."""
        return sum(self.passes.values())

    def __str__(self) -> str:
        cache = " (from its cache)" if self.cached else ""
        ahead = f", {self.ready} of {self.kernels} kernels ahead in {self.ahead:.1f} s" if self.kernels else ""
        return (
            f"graph {self.graph}: {self.linears} linear products, passes {self.rewriting:.1f} s, "
            f"Inductor {self.inductor:.1f} s{cache}{ahead}"
        )


_times: deque[CompileTime] = deque(maxlen=KEPT)
_numbers = itertools.count(1)


def compile_times() -> list[CompileTime]:
    """One entry for every graph that the backend ``"intscale"`` compiled in this process, in order."""
    return list(_times)


@contextlib.contextmanager
def timed(linears: int, passes: Mapping[str, float], ahead: Optional[Ahead] = None) -> Iterator[None]:
    """Measure what Inductor does in this context, end ``ahead`` and add an entry; nothing is added where it fails."""
    hits, start = _cache_hits(), time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    background = (0, 0, 0.0)
    if ahead is not None:
        ahead.finish()
        background = (len(ahead.kernels), len(ahead.ready), ahead.seconds)
    entry = CompileTime(next(_numbers), linears, dict(passes), seconds, _cache_hits() > hits, *background)
    _times.append(entry)
    log.info("%s", entry)


def _cache_hits() -> int:
    # Slow to import.
    from torch._dynamo.utils import counters

    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
