"""The int32 accumulator of one to four tokens on a CPU with AVX512-VNNI: the weight is read as it is stored, 4 bits for a code.

oneDNN's product takes weights unpacked to 8 bits, and for a single token reaches a part of the memory's speed only. Same
integers, so nothing depends on which of them runs. Compiled by the machine's C++ compiler on first use (``few_tokens.cpp``).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ..integrations.c_library import compiled_function

SOURCE = Path(__file__).with_name("few_tokens.cpp")
FLAGS = ("-O3", "-march=native")
MOST_TOKENS = 4
ENOUGH_CODES = 1 << 20  # of a weight for each thread beside the first: starting one takes some 30 us
MOST_THREADS = 4  # above, oneDNN's threads read the unpacked weight faster than the few that this starts


@functools.cache
def library() -> Optional[Any]:
    """The compiled function; None where the processor has no such instructions, or there is no compiler (logged once)."""
    if platform.machine() not in ("x86_64", "AMD64") or not _has_vnni():
        return None
    number, pointer, wide = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    types = [*[pointer] * 4, number, *[wide] * 4, number, number, number]
    return compiled_function(SOURCE, "intscale_few_tokens", FLAGS, types, "single tokens are multiplied by oneDNN")


def _has_vnni() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return {"avx512_vnni", "avx512vl", "avx512bw"} <= set(flags)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="intscale")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads


def accumulate_few(x: Tensor, qdata: Tensor, scale: Tensor, group_size: int) -> Optional[Tensor]:
    """int32 ``[M, N]`` of int8 ``[M, K]``, ``M`` up to :data:`MOST_TOKENS`, and a weight in plain packing without zero points.

    None where this machine cannot, or where another way is faster: many threads.
    """
    function, threads = library(), torch.get_num_threads()
    if function is None or threads > MOST_THREADS or scale.dtype != torch.uint8:
        return None
    x, qdata, scale = x.contiguous(), qdata.contiguous(), scale.contiguous()
    (tokens, features), rows, groups = x.shape, qdata.shape[0], scale.shape[1]
    wide = qdata.dtype == torch.int8
    if wide and groups != 1:
        return None
    padded = qdata.shape[1] * (1 if wide else 2)
    out = torch.empty((tokens, rows), dtype=torch.int32)
    addresses = x.data_ptr(), qdata.data_ptr(), scale.data_ptr(), out.data_ptr()

    def part(start: int, stop: int) -> None:
        places = (
            addresses[0],
            addresses[1] + start * qdata.shape[1],
            addresses[2] + start * groups,
            addresses[3] + 4 * start,
        )
        function(*places, tokens, stop - start, rows, features, padded, groups, group_size, wide)

    parts = min(threads, max(1, rows * padded // ENOUGH_CODES))
    if parts == 1:
        part(0, rows)
    else:
        edges = [rows * i // parts for i in range(parts + 1)]
        others = [_pool(MOST_THREADS - 1).submit(part, *edge) for edge in zip(edges[1:-1], edges[2:])]
        part(0, edges[1])
        for other in others:
            other.result()
    return out
