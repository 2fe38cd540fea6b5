"""Rounding the columns of a block of GPTQ on a CPU, compiled by the C++ compiler of the machine on first use.

A column takes five operators of PyTorch and passes over memory; ``gptq_block.cpp`` rounds all columns of a strip of rows in
the L1 cache, with the same bits.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ..integrations.c_library import compiled_function

SOURCE = Path(__file__).with_name("gptq_block.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
MAX_COLUMNS = 128


@functools.cache
def library() -> Optional[Any]:
    """The compiled function, or None, with the reason logged once, where it cannot be compiled."""
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    types = [pointer, number] * 4 + [number, ctypes.c_int, ctypes.c_float, ctypes.c_float, pointer, pointer]
    return compiled_function(SOURCE, "intscale_gptq_block", FLAGS, types, "GPTQ rounds columns by PyTorch operators")


def round_block_cpu(
    target: Tensor, reference: Tensor, steps: Tensor, rows: Tensor, code_range: tuple[int, int]
) -> Optional[tuple[Tensor, Tensor]]:
    """As ``calibration.gptq.round_block``, for fp32 tensors on a CPU; None where this machine has no compiler."""
    function = library()
    batch, count, columns = target.shape
    if (
        function is None
        or columns > MAX_COLUMNS
        or any(t.dtype != torch.float32 for t in (target, reference, steps, rows))
    ):
        return None
    target, reference, steps, rows = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (target, reference, steps, rows)
    )
    codes = torch.empty((batch, columns, count), dtype=torch.int8)
    errors = torch.empty((batch, columns, count))
    for b in range(batch):
        operands = [part for t in (target, reference, steps, rows) for part in (t[b].data_ptr(), t.stride(-2))]
        function(*operands, count, columns, *code_range, codes[b].data_ptr(), errors[b].data_ptr())
    return codes.mT, errors.mT
