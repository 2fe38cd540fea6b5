"""How our launchers start a kernel, and how the same launchers name the kernels that a call would start.

Every launcher goes through :func:`launch`. In the context :func:`collected` nothing is started: each call is recorded with
arguments that have the types of the real ones, so that a kernel compiled from it is the kernel that the real call looks for.
A launcher may then be called with fake tensors. In the context :func:`recorded` nothing is started either, and arguments are
recorded as they are: ``prepared`` makes a sequence of launches of them that is started without the launcher from then on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _State(threading.local):
    found: list[Launch] | None = None
    recording: Recording | None = None


_state = _State()
GPU_IMPLEMENTATIONS: dict[str, Callable] = {}  # by name of the op, such as intscale::w4a8_linear


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of one launch, tensors replaced by stand-ins of their dtype."""

    kernel: Any
    args: tuple
    kwargs: dict[str, Any]


class Recording:
    """Launches recorded with their real arguments.

    Attributes:
        launches: ``(kernel, grid, positional arguments, keyword arguments)``.
        counters: split-K counters that the launches share, at least ``count``; the launch that is made of them takes others.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[int, ...], tuple, dict[str, Any]]] = []
        self.counters: list[Tensor] = []

    def take_counters(self, device: torch.device, count: int) -> Tensor:
        """A stand-in for the counters of one launch."""
        self.counters.append(torch.empty(-(-count // 4) * 4, dtype=torch.int32, device=device))
        return self.counters[-1]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Start ``kernel`` on ``grid``; under :func:`collected` and :func:`recorded` only record the launch."""
    if _state.found is not None:
        _state.found.append(Launch(kernel, tuple(_without_memory(a) for a in args), kwargs))
    elif _state.recording is not None:
        _state.recording.launches.append((kernel, grid, args, kwargs))
    else:
        kernel[grid](*args, **kwargs)


def recording() -> Recording | None:
    """What this thread records, in the context :func:`recorded`."""
    return _state.recording


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """In this context, and in this thread, launches are put into the recording that it yields and not started."""
    before, _state.recording = _state.recording, Recording()
    try:
        yield _state.recording
    finally:
        _state.recording = before


def collecting() -> bool:
    """Whether this thread is in the context :func:`collected`."""
    return _state.found is not None


@contextlib.contextmanager
def collected() -> Iterator[list[Launch]]:
    """In this context, and in this thread, launches are put into the list that it yields and not started."""
    before, _state.found = _state.found, []
    try:
        yield _state.found
    finally:
        _state.found = before


def _without_memory(value: Any) -> Any:
    return stand_in(value) if isinstance(value, Tensor) else value


def stand_in(x: Tensor) -> Any:
    """What has the dtype of ``x`` and, as every tensor of ours and of Inductor, an address that is a multiple of 16."""
    # Only GPUs need Triton.
    from triton.runtime.jit import MockTensor

    return MockTensor(x.dtype, list(x.shape))


def described(x: Tensor) -> Any:
    """``x`` as the base of a tensor descriptor."""
    return stand_in(x) if collecting() else x
