"""How our launchers start a kernel, and how the same launchers name the kernels that a call would start.

Every launcher goes through :func:`launch`. In the context :func:`collected` nothing is started: each call is put down with
arguments that have the types of the real ones, so that a kernel compiled from it is the kernel that the real call looks for.
A launcher may then be called with fake tensors.
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


_state = _State()
GPU_IMPLEMENTATIONS: dict[str, Callable] = {}  # by name of the op, such as intscale::w4a8_linear


def on_gpu(op: str) -> Callable[[Callable], Callable]:
    """Decorator: the function is the op's implementation on a GPU."""

    def register(function: Callable) -> Callable:
        torch.library.impl(op, "CUDA", function)
        GPU_IMPLEMENTATIONS[op] = function
        return function

    return register


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of one launch, tensors replaced by stand-ins of their dtype."""

    kernel: Any
    args: tuple
    kwargs: dict[str, Any]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Start ``kernel`` on ``grid``; under :func:`collected` only put the launch down."""
    if _state.found is None:
        kernel[grid](*args, **kwargs)
    else:
        _state.found.append(Launch(kernel, tuple(_without_memory(a) for a in args), kwargs))


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
    from triton.runtime.jit import MockTensor

    return MockTensor(x.dtype, list(x.shape))


def described(x: Tensor) -> Any:
    """``x`` as the base of a tensor descriptor."""
    return stand_in(x) if collecting() else x
