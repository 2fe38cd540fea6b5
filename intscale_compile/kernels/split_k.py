"""Arrival counters of split-K tiles: one int32 per tile, 0 before and after every launch.

Two launches that may run at the same time must not share counters. Eager calls of one stream run in order and share a
range; every launch captured in a CUDA graph gets a range of its own, since graphs may be replayed beside each other.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..integrations.torch_state import raw_stream
from .launching import collecting, recording

CHUNK = 1 << 20  # counters allocated at a time, 4 MiB: thousands of captured launches
STREAM_RANGE = 4096  # counters of a stream; larger grids need no split


def _zeros_outside_pools(device: torch.device) -> Tensor:
    """A chunk of zeros from the ordinary allocator, also while this thread allocates from the pool of a CUDA graph.

    Inductor warms a graph up in its pool, and refuses to record it if anything in there outlives the call.
    """
    made: list[Tensor] = []

    def allocate() -> None:
        with torch.cuda.device(device):
            made.append(torch.zeros(CHUNK, dtype=torch.int32, device=device))
            torch.cuda.current_stream(device).synchronize()

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    return made[0]


class Counters:
    """Counters of one device."""

    def __init__(self, device: torch.device, index: int):
        self.device, self.index = device, index
        self.streams: dict[int, Tensor] = {}
        self.chunks = [_zeros_outside_pools(device)]  # none is ever freed: captured launches hold bare addresses
        self.used = 0

    def _fresh(self, count: int) -> Tensor:
        first, self.used = self.used, self.used + count
        return self.chunks[-1][first : self.used]  # 16-byte aligned, since every count is a multiple of 4

    def take(self, count: int) -> Tensor:
        """At least ``count`` zeros, int32, for one launch on the current stream."""
        count = -(-count // 4) * 4
        if torch.cuda.is_current_stream_capturing():
            if self.used + count <= CHUNK:
                return self._fresh(count)
            return torch.zeros(count, dtype=torch.int32, device=self.device)  # cleared by the graph itself
        if self.used + max(count, STREAM_RANGE) > CHUNK:
            self.chunks.append(_zeros_outside_pools(self.device))
            self.used = 0
        stream = raw_stream(self.index)  # type: ignore[misc]
        found = self.streams.get(stream)
        if found is None or len(found) < count:
            found = self.streams[stream] = self._fresh(max(count, STREAM_RANGE))
        return found


_counters: dict[int, Counters] = {}


def take_counters(device: torch.device, count: int) -> Tensor:
    """At least ``count`` zeros, int32, that no other launch in flight uses; the kernel leaves them zero."""
    if collecting():
        return torch.empty(count, dtype=torch.int32, device=device)
    if (record := recording()) is not None:
        return record.take_counters(device, count)
    if device.type == "cpu":  # Triton's interpreter
        return torch.zeros(count, dtype=torch.int32)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _counters:
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        _counters[index] = Counters(device, index)
    return _counters[index].take(count)
