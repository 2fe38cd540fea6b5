"""The exhaustive search of integer group scales on a CPU, compiled by the C++ compiler of the machine on first use.

``scale_search.cpp`` is several times faster than the same search as operators of PyTorch. It marks the candidates of a row
among which another order of float sums might decide otherwise; the caller compares these with operators, so that the result is
theirs in every row. A machine without a compiler has the operators for all rows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ..integrations.c_library import compiled_function

SOURCE = Path(__file__).with_name("scale_search.cpp")
EXACT = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
FLAGS = (*EXACT, "-fassociative-math", "-fno-signed-zeros", "-ffinite-math-only")
WIDE = ("-mprefer-vector-width=512",)  # of x86
MAX_GROUPS = 4096
MAX_CANDIDATES = 64
FEW_ELEMENTS = 1 << 14  # below, one thread


@functools.cache
def library() -> Optional[Any]:
    """The compiled function, or None, with the reason logged once, where it cannot be compiled."""
    number, pointer = ctypes.c_int, ctypes.c_void_p
    types = [pointer, pointer, ctypes.c_int64, number, number, number, pointer, number, pointer, pointer, pointer]
    consequence = "group scales are searched by PyTorch operators"
    return compiled_function(SOURCE, "intscale_scale_search", FLAGS, types, consequence, WIDE)


def search_integer_scales_cpu(
    groups: Tensor, scale_max: int, row_steps: Sequence[float], weights: Optional[Tensor]
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    """The best row step and integer scales of each row, where the order of sums does not matter.

    Args:
        groups: fp32 ``[R, G, g]`` on a CPU, rows normalised to a largest magnitude of 1.
        scale_max: largest integer scale, at most 255.
        row_steps: candidates, at most 64.
        weights: fp32 ``[G, g]`` or None.

    Returns:
        Index of the row step int64 ``[R, 1]``, scales fp32 ``[R, G]``, and int64 ``[R]``: 0, or bits of the row steps among which
        the row must be searched otherwise. None: this machine has no compiler, or the rows are too long.
    """
    rows, count, size = groups.shape
    if count > MAX_GROUPS or len(row_steps) > MAX_CANDIDATES or not rows or (function := library()) is None:
        return None
    groups = groups.contiguous()
    counts = None if weights is None else weights.contiguous()
    steps = torch.tensor(row_steps, dtype=torch.float64)
    chosen = torch.empty(rows, dtype=torch.int32)
    scales = torch.empty((rows, count), dtype=torch.uint8)
    unsure = torch.empty(rows, dtype=torch.int64)

    def part(start: int, stop: int) -> None:
        function(
            groups[start].data_ptr(), None if counts is None else counts.data_ptr(), stop - start, count, size, scale_max,
            steps.data_ptr(), len(steps), chosen[start:].data_ptr(), scales[start].data_ptr(), unsure[start:].data_ptr(),
        )  # fmt: skip

    threads = min(torch.get_num_threads(), rows) if groups.numel() > FEW_ELEMENTS else 1
    if threads == 1:
        part(0, rows)
    else:
        edges = [rows * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, edges[:-1], edges[1:]))
    return chosen.long().unsqueeze(1), scales.float(), unsure
