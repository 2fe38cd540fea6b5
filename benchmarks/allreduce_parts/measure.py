"""Times of all peers at one size, in turn, and their errors.

On a GPU the calls of a peer, one for each copy of its input, are one CUDA graph. Before each replay the inputs are restored,
the GPU spins until everything is queued, and a tiny all-reduce brings the ranks together. On a CPU each call is timed on the
wall clock behind a barrier.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from ranks import agreed, largest
from torch import Tensor

from .peers import Peer, Unavailable, copies
from .results import Point

SPIN_CYCLES = 1_000_000  # about half a millisecond, more than the host takes to queue what follows
REPLAY_MS = {"cuda": 40.0, "cpu": 3000.0}  # of each peer at each size
LEAST, MOST = 5, 30  # replays


def random_input(elements: int, device: torch.device, rank: int, copy: int) -> Tensor:
    """What a rank puts in, bf16 ``[elements]``; any rank can make it."""
    generator = torch.Generator(device).manual_seed(1000 * rank + copy)
    return torch.randn(elements, generator=generator, device=device, dtype=torch.float32).to(torch.bfloat16)


def exact_sum(elements: int, device: torch.device) -> Tensor:
    """fp64 sum of the first copies of all ranks."""
    total = torch.zeros(elements, dtype=torch.float64, device=device)
    for rank in range(dist.get_world_size()):
        total += random_input(elements, device, rank, 0)
    return total


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact sum."""
    return float((out.double() - exact).norm() / exact.norm())


def identical(out: Tensor) -> bool:
    """Whether all ranks have the same bits, by two sums over them."""
    bits = out.view(torch.int16).to(torch.int64)
    place = torch.arange(1, bits.numel() + 1, device=out.device)
    place.mul_(0x5851F42D4C957F2D).bitwise_xor_(place >> 29)  # wraps around
    mine = torch.stack([bits.sum(), (bits * place).sum()])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return all(torch.equal(other, mine) for other in every)


class Clock:
    """Times replays of the calls of one peer.

    Attributes:
        graph: of all calls; None where there is no GPU, or it could not be captured.
        outs: what the calls gave at last.
    """

    def __init__(self, peer: Peer, sources: Tensor):
        self.peer, self.sources, self.calls = peer, sources, sources.shape[0]
        self.graph: Optional[torch.cuda.CUDAGraph] = None
        self.outs: list[Tensor] = []
        self._events: list[tuple[Any, Any]] = []
        self._flag = torch.zeros(1, device=sources.device)
        self.samples_us: list[float] = []

    def capture(self) -> Optional[str]:
        """Capture the calls; on all ranks or on none. Returns why it failed here."""
        problem, graph = None, torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        dist.barrier()
        try:
            # the watchdog of NCCL asks for its events meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            torch.cuda.synchronize()
        if agreed(problem is None, self.sources.device):
            self.graph = graph
        else:
            problem = problem or "another rank could not"
        return problem

    def _run(self) -> None:
        self.outs = [self.peer.call(copy) for copy in range(self.calls)]

    def replay(self) -> None:
        """Time all calls once; on a GPU ``finish`` reads the time."""
        self.peer.restore(self.sources)
        if not self.sources.is_cuda:
            dist.barrier()
            start = time.perf_counter()
            self._run()
            self.samples_us.append((time.perf_counter() - start) * 1e6 / self.calls)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)
        dist.all_reduce(self._flag)
        begin.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()
        end.record()
        self._events.append((begin, end))

    def finish(self) -> list[float]:
        """Microseconds of a call, of each replay so far."""
        if self._events:
            torch.cuda.synchronize()
            self.samples_us += [begin.elapsed_time(end) * 1e3 / self.calls for begin, end in self._events]
            self._events = []
        return self.samples_us


def measure(
    peers: Sequence[Peer], nbytes: int, device: torch.device, note: Callable[[str], None], replay_ms: float
) -> list[Point]:
    """All peers at one size; the same points on every rank.

    Args:
        note: is told why a peer has no point, or was not timed in a graph.
        replay_ms: how long each peer is timed, about.
    """
    elements, rank = nbytes // 2, dist.get_rank()
    count = copies(nbytes, device)
    sources = torch.stack([random_input(elements, device, rank, copy) for copy in range(count)])
    exact = exact_sum(elements, device)
    clocks, points, checked = {}, {}, {}
    for peer in peers:
        peer.take(sources)
        peer.restore(sources)
        try:
            out = peer.call(0)
        except Unavailable as reason:
            note(f"{peer.name}: {reason}")
            continue
        checked[peer.name] = out.clone()
        points[peer.name] = Point(nbytes, peer.name, 0.0, [], relative_error(out, exact), identical(out))
        clocks[peer.name] = Clock(peer, sources)
        if device.type == "cuda" and (problem := clocks[peer.name].capture()):
            note(f"{peer.name} at {nbytes} bytes is not timed in a CUDA graph: {problem}")
        points[peer.name].graph = clocks[peer.name].graph is not None
    del exact
    turns = _turns(clocks, device, replay_ms)
    for turn in range(max(turns.values(), default=0)):
        for name, clock in clocks.items():
            if turn < turns[name]:
                clock.replay()
    for name, clock in clocks.items():
        points[name].us, points[name].samples_us = _slowest(clock.finish())
        points[name].repeatable = agreed(torch.equal(clock.outs[0], checked[name]), device)
    return list(points.values())


def _turns(clocks: dict[str, Clock], device: torch.device, replay_ms: float) -> dict[str, int]:
    """How often each peer is replayed; one replay that is not kept tells its time."""
    turns = {}
    for name, clock in clocks.items():
        clock.replay()
        once = largest(clock.finish().pop(), device) * clock.calls / 1e3
        turns[name] = max(LEAST, min(MOST, int(replay_ms / max(once, 1e-3))))
    return turns


def _slowest(samples: list[float]) -> tuple[float, list[float]]:
    """Median and samples of the rank whose median is the largest."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, samples)
    slowest = max(every, key=statistics.median)
    return statistics.median(slowest), [round(us, 2) for us in slowest]
