"""``intscale::int_attention`` on a CPU: ``attention.cpp``, compiled by the C++ compiler of the machine on first use."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ...integrations.c_library import compiled_function

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-pthread")
WIDE = ("-mprefer-vector-width=512",)  # of x86
MOST_KEYS = 1 << 15
FEW_PRODUCTS = 1 << 20  # below, one thread


@functools.cache
def library() -> Optional[Any]:
    """The compiled function, or None, with the reason logged once, where it cannot be compiled."""
    types = [ctypes.c_void_p] * 9
    consequence = "attention of integer-only models runs by PyTorch operators"
    return compiled_function(SOURCE, "intscale_integer_attention", FLAGS, types, consequence, WIDE)


def attention_cpu(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, mask: Optional[Tensor], causal: bool,
    c_m: int, c_k: int,
) -> Optional[Tensor]:  # fmt: skip
    """Arguments and result as of ``int_attention``, on a CPU; None where there is no compiler, or too many keys."""
    (batch, heads, tokens, features), (shared, keys) = q.shape, k.shape[1:3]
    if keys > MOST_KEYS or not q.numel() or not keys or (function := library()) is None:
        return None
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    operands = (q, q_scale, k, k_scale, v, v_scale)
    out = torch.empty(q.shape, dtype=torch.int32)
    shown = None if mask is None else mask.expand(batch, heads, tokens, keys)
    threads = torch.get_num_threads() if q.numel() * keys > FEW_PRODUCTS else 1
    numbers = [batch, heads, shared, tokens, keys, features, int(causal), c_m, c_k, threads]
    for x in operands:
        numbers += x.stride()[:3]
    numbers += (0, 0, 0, 0) if shown is None else shown.stride()
    pointers = [x.data_ptr() for x in operands]
    where = None if shown is None else shown.data_ptr()
    function(*pointers, where, out.data_ptr(), (ctypes.c_int64 * len(numbers))(*numbers))
    return out
