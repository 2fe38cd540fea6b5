"""Weights on a GPU, looked at once in each pass through a model: one kernel for all of them, which nobody waits for.

A call of a compiled graph starts the kernel before its own, and reads what the one before has found: a flag in pinned memory.
So a write is noticed by the second call after it. Where several graphs take turns (regional compilation, two models), one
start serves all that are called until a graph comes again; a graph that is not the first of its turn takes a result that is
not there yet at its next call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.fingerprint import pieces_of


class _Watched(NamedTuple):
    tensor: weakref.ref
    address: int
    row: tuple[int, int, int, int]
    sample: Tensor


class GpuSamples:
    """The weights of one GPU.

    Args:
        device: where they are.
        changed: is given the weights that have changed.
        gpu: starts the kernel and makes events; the tests have one of their own.
    """

    def __init__(self, device: torch.device, changed: Callable[[Sequence[Tensor]], None], gpu: Any = None):
        self.started = 0
        self._device, self._changed, self._gpu = device, changed, gpu or Gpu()
        self._watched: dict[int, _Watched] = {}
        self._started: list[_Watched] = []  # those of the kernel that was started last, in its order
        self._table: Any = None  # None: not of ``_watched`` as they are
        self._flags, self._view = self._gpu.flags(1)  # type: ignore[var-annotated]
        self._done: Any = None

    def add(self, tensor: Tensor) -> None:
        """Watch a weight from now on, with its memory as it is now."""
        pieces = pieces_of(tensor)
        if pieces is None:
            return
        sample = torch.empty(self._gpu.words, dtype=torch.int32, device=self._device)
        row = (pieces.address, pieces.step, pieces.words, sample.data_ptr())
        self._gpu.run(torch.tensor([row], dtype=torch.int64, device=self._device), self._flags, False)
        key = id(tensor)
        gone = weakref.ref(tensor, lambda _: self._drop(key))
        self._watched[key] = _Watched(gone, tensor.data_ptr(), row, sample)
        self._table = None

    def _drop(self, key: int) -> None:
        self._watched.pop(key, None)
        self._table = None

    def look(self, seen: int) -> int:
        """Called by a graph before each of its calls with what the last one returned; at first with ``started``."""
        if not self._watched or self._gpu.capturing():
            return seen
        if seen != self.started:
            self._collect(wait=False)
        else:
            self._collect(wait=True)
            self._start()
        return self.started

    def _collect(self, wait: bool) -> None:
        """Report what the last kernel found, if it has ended; it stands before the call that started it in the stream."""
        if self._done is None or not (wait or self._done.query()):
            return
        self._done.synchronize()
        self._done = None
        if self._view[0]:
            found = [(entry, entry.tensor()) for entry, flag in zip(self._started, self._view[1:]) if flag]
            self._view[:] = 0
            changed = [t for entry, t in found if t is not None and self._watched.get(id(t)) is entry]
            for tensor in changed:
                self._drop(id(tensor))
            self._changed(changed)

    def _start(self) -> None:
        for key, entry in list(self._watched.items()):  # memory that was freed must not be read
            tensor = entry.tensor()
            if tensor is None or tensor.data_ptr() != entry.address:
                self._drop(key)
        if not self._watched:
            return
        if self._table is None:
            self._started = list(self._watched.values())
            self._table = torch.tensor([w.row for w in self._started], dtype=torch.int64, device=self._device)
            if len(self._view) < 1 + len(self._started):
                self._flags, self._view = self._gpu.flags(1 + 2 * len(self._started))
        self._done = self._gpu.run(self._table, self._flags, True)
        self.started += 1


class Gpu:
    """What :class:`GpuSamples` needs of a GPU."""

    def __init__(self) -> None:
        from ..kernels.triton_fingerprint import SAMPLED_WORDS, run_fingerprints  # Triton, which a CPU does without

        self.words, self._run = SAMPLED_WORDS, run_fingerprints

    def flags(self, count: int) -> tuple[Tensor, Any]:
        """Zeros int32 ``[count]`` in pinned memory, and the same as an array that is read without PyTorch."""
        flags = torch.zeros(count, dtype=torch.int32, pin_memory=True)
        return flags, flags.numpy()

    def run(self, table: Tensor, flags: Tensor, compare: bool) -> Any:
        """Start the kernel on the current stream; an event after it."""
        with torch.cuda.device(table.device):
            self._run(table, flags, compare)
            event = torch.cuda.Event()
            event.record()
            return event

    def capturing(self) -> bool:
        """Whether the caller captures a CUDA graph, in which nothing may be asked."""
        return torch.cuda.is_current_stream_capturing()
