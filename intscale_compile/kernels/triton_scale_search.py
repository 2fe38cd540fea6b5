"""The exhaustive search of integer group scales on a GPU: one program per row, all candidates in registers.

The same search as ``scale_search.search_integer_scales``; only the order of float sums differs, so a tie may fall otherwise.
Eager PyTorch would move about 60 bytes per weight and candidate pair through memory, this kernel reads a row once.
"""

from __future__ import annotations

import contextlib
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_WEIGHTS = 2048  # weights held by one program at a time: 16 registers a thread with 4 warps


@triton.jit
def _least_errors(w, counts, row_step, SCALE_MAX: tl.constexpr, WEIGHTED: tl.constexpr):
    """Least squared error of every group over the integers 1..SCALE_MAX, and the integer. ``w``, ``counts``: [groups, g]."""
    least = tl.full([w.shape[0]], float("inf"), tl.float32)
    best = tl.full([w.shape[0]], 1, tl.int32)
    for scale in range(1, SCALE_MAX + 1):
        step = row_step * scale
        clamped = tl.minimum(tl.maximum(w * (1.0 / step), -8.0), 7.0)
        codes = (clamped + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
        rest = w - codes * step
        error = tl.sum(rest * rest * counts if WEIGHTED else rest * rest, axis=1)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, scale, best)
    return least, best


@triton.jit
def _search_kernel(w_ptr, counts_ptr, fractions_ptr, step_ptr, scale_ptr, base_step, G, FRACTIONS: tl.constexpr,
                   SCALE_MAX: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    in_group = tl.arange(0, GROUP)[None, :]
    best_total = float("inf")
    best_step = base_step
    for i in range(FRACTIONS):
        row_step = base_step * tl.load(fractions_ptr + i)
        total = 0.0
        for start in range(0, G, BLOCK_G):
            g = start + tl.arange(0, BLOCK_G)
            w = tl.load(w_ptr + row * G * GROUP + g[:, None] * GROUP + in_group, mask=g[:, None] < G, other=0.0)
            counts = w
            if WEIGHTED:
                counts = tl.load(counts_ptr + g[:, None] * GROUP + in_group, mask=g[:, None] < G, other=0.0)
            least, _ = _least_errors(w, counts, row_step, SCALE_MAX, WEIGHTED)
            total += tl.sum(least, axis=0)
        better = total < best_total
        best_total = tl.where(better, total, best_total)
        best_step = tl.where(better, row_step, best_step)
    tl.store(step_ptr + row, best_step)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        w = tl.load(w_ptr + row * G * GROUP + g[:, None] * GROUP + in_group, mask=g[:, None] < G, other=0.0)
        counts = w
        if WEIGHTED:
            counts = tl.load(counts_ptr + g[:, None] * GROUP + in_group, mask=g[:, None] < G, other=0.0)
        _, scales = _least_errors(w, counts, best_step, SCALE_MAX, WEIGHTED)
        tl.store(scale_ptr + row * G + g, scales.to(tl.float32), mask=g < G)


def search_integer_scales_gpu(
    groups: Tensor, scale_max: int, fractions: tuple[float, ...], plain_step: float, weights: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """Row steps fp32 ``[R, 1]`` and integer scales fp32 ``[R, G]`` for normalised groups fp32 ``[R, G, g]``.

    ``weights``: fp32 ``[G, g]``, what the squared error of each column counts, or None.
    """
    rows, count, group = groups.shape
    steps = groups.new_empty(rows, 1)
    scales = groups.new_empty(rows, count)
    table = torch.tensor(fractions, dtype=torch.float32, device=groups.device)
    block = max(1, min(BLOCK_WEIGHTS // group, triton.next_power_of_2(count)))
    with torch.cuda.device(groups.device) if groups.is_cuda else contextlib.nullcontext():
        _search_kernel[(rows,)](
            groups.contiguous(), groups if weights is None else weights.contiguous(), table, steps, scales,
            1.0 / (plain_step * scale_max), count, FRACTIONS=len(fractions), SCALE_MAX=scale_max, GROUP=group,
            BLOCK_G=block, WEIGHTED=weights is not None, num_warps=4,
        )  # fmt: skip
    return steps, scales
