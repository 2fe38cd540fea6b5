"""The widths of I-LLM's paper, to see what they cost: 8 bits for probabilities and for sigmoids, where we have 15."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from ..kernels.integer import attention, pointwise
from ..kernels.integer.arithmetic import rdiv, rsh, sigmoid

DROPPED = 7  # fraction bits


def _probabilities(a: Tensor, b: Tensor) -> Tensor:
    return rdiv(a >> DROPPED, b) << DROPPED


def _sigmoid(x: Tensor) -> Tensor:
    return rsh(sigmoid(x), DROPPED) << DROPPED


@contextlib.contextmanager
def paper_widths() -> Iterator[None]:
    """Operators that run one by one within it (``run_eagerly``) have these widths; for all threads, and for comparisons only."""
    before = attention.attention_cpu, attention.divide_rows, pointwise.sigmoid
    attention.attention_cpu, attention.divide_rows = lambda *_: None, _probabilities
    pointwise.sigmoid = _sigmoid
    try:
        yield
    finally:
        attention.attention_cpu, attention.divide_rows, pointwise.sigmoid = before
