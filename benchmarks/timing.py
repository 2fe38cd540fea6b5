"""Timing on a GPU that the benchmarks share, and what to record beside a figure.

A call is captured into a CUDA graph once for each copy of its weight, so that a replay finds none of them in the L2 cache.
Replays of the things compared take turns. The GPU spins before each replay, so that launching it is not timed.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from intscale_compile.compile.inductor_settings import code_generation
from intscale_compile.kernels.tile_timing import replay_ms

COPY_SET_BYTES = 3e9  # of all copies of one weight


class Budget:
    """Wall-clock seconds for a whole run."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        """Seconds until the end, negative after it."""
        return self.end - self._clock()

    def spent(self, needed: float = 0.0) -> bool:
        """Whether less than ``needed`` seconds are left."""
        return self.left() < needed


def copy_count(nbytes: int, l2_bytes: int, cap: float = COPY_SET_BYTES) -> int:
    """How many copies of a weight exceed twice the L2 together: at least 2, fewer only where ``cap`` forbids it."""
    wanted = max(2, int(2 * l2_bytes // nbytes) + 1)
    return max(1, min(wanted, int(cap // nbytes)))


def l2_bytes() -> int:
    """Size of the current device's L2 cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls; what is compiled or allocated at first use is so before."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def alternate_ms(
    graphs: Mapping[str, Any],
    budget_ms: float = 50.0,
    least: int = 5,
    most: int = 100,
    clock: Callable[[Any], float] = replay_ms,
) -> dict[str, list[float]]:
    """Milliseconds of each replay of each graph; they take turns, after one replay that is not kept.

    A graph gets as many replays as fit in ``budget_ms``, from ``least`` to ``most``, spread evenly over all turns.
    """
    warm_up = {name: clock(graph) for name, graph in graphs.items()}
    replays = {name: min(most, max(least, int(budget_ms / max(ms, 1e-6)))) for name, ms in warm_up.items()}
    turns = max(replays.values(), default=0)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(turns):
        for name, graph in graphs.items():
            if (turn + 1) * replays[name] // turns > turn * replays[name] // turns:
                times[name].append(clock(graph))
    return times


def median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one call, of one thing on its own; ``calls`` use different buffers."""
    times = alternate_ms({"": capture(calls)})[""]
    return statistics.median(times) * 1e3 / len(calls)


def compiled_us(calls: Mapping[str, Sequence[Callable[[], object]]]) -> dict[str, float]:
    """Median microseconds of one call of each thing, in turn; code is generated as in a compiled model.

    ``calls`` has a call for each copy of the weight.
    """
    torch._dynamo.reset()
    with code_generation():  # rows of 14336 in registers
        graphs = {name: capture(each) for name, each in calls.items()}
    times = alternate_ms(graphs)
    del graphs
    release()
    return {name: statistics.median(ms) * 1e3 / len(calls[name]) for name, ms in times.items()}


def copy_bandwidth(nbytes: int = 2 << 30) -> float:
    """Bytes per second of a large device-to-device copy, those read and those written together."""
    source, target = (torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    return 2 * nbytes / (median_us([lambda: target.copy_(source)]) * 1e-6)


def release() -> None:
    """Return what is no longer referenced to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def environment() -> dict[str, str | None]:
    """Device, driver, versions, commit and UTC date of a run."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "torchao", "humming-kernels", "gemlite")},
        "commit": _first_line("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
    }
