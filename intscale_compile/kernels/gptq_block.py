"""The inner loop of GPTQ on a GPU: up to 128 columns rounded one after the other, all rows at once.

Rows do not depend on each other. One program holds the errors of some rows in registers; the sum over the errors of
earlier columns is one multiplication of that tile and a reduction. Eager PyTorch would launch about six kernels a column.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16  # errors and codes of 16 x 128 weights: 32 registers a thread with 4 warps


@triton.jit
def _round_block_kernel(target_ptr, reference_ptr, steps_ptr, rows_ptr, codes_ptr, errors_ptr, N, C, low, high,
                        target_batch, target_row, reference_batch, reference_row, steps_batch, steps_row,
                        BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = n < N
    target_ptr += batch * target_batch + n * target_row
    reference_ptr += batch * reference_batch + n * reference_row
    steps_ptr += batch * steps_batch + n * steps_row
    errors = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    codes = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for j in range(C):
        above = tl.load(rows_ptr + (batch * C + j) * C + c, mask=c < j, other=0.0)
        target = tl.load(target_ptr + j, mask=inside, other=0.0) + tl.sum(errors * above[None, :], axis=1)
        step = tl.load(steps_ptr + j, mask=inside, other=1.0)
        clamped = tl.minimum(tl.maximum(tl.div_rn(target, step), low), high)
        code = (clamped + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
        error = tl.load(reference_ptr + j, mask=inside, other=0.0) - code * step
        errors = tl.where(c[None, :] == j, error[:, None], errors)
        codes = tl.where(c[None, :] == j, code[:, None], codes)
    mask = inside[:, None] & (c[None, :] < C)
    offsets = (batch * N + n[:, None]) * C + c[None, :]
    tl.store(codes_ptr + offsets, codes.to(tl.int8), mask=mask)
    tl.store(errors_ptr + offsets, errors, mask=mask)


def round_block_gpu(
    target: Tensor, reference: Tensor, steps: Tensor, rows: Tensor, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Codes int8 and errors fp32 ``[B, N, C]``; operands as in ``calibration.gptq.round_block``, ``C`` at most 128."""
    batch, n, columns = target.shape
    target, reference, steps = (x if x.stride(-1) == 1 else x.contiguous() for x in (target, reference, steps))
    codes = torch.empty((batch, n, columns), dtype=torch.int8, device=target.device)
    errors = torch.empty((batch, n, columns), dtype=torch.float32, device=target.device)
    grid = (triton.cdiv(n, BLOCK_ROWS), batch)
    with torch.cuda.device(target.device) if target.is_cuda else contextlib.nullcontext():
        _round_block_kernel[grid](
            target, reference, steps, rows.mT.contiguous(), codes, errors, n, columns,
            float(code_range[0]), float(code_range[1]),
            target.stride(0), target.stride(1), reference.stride(0), reference.stride(1), steps.stride(0), steps.stride(1),
            BLOCK_N=BLOCK_ROWS, BLOCK_C=triton.next_power_of_2(columns), num_warps=4,
        )  # fmt: skip
    return codes, errors
