"""The messages of the quantized collectives on a CPU, compiled by the C++ compiler of the machine on first use.

The reference is a dozen passes over memory, each an operator of PyTorch; ``codec.cpp`` is one. The library is compiled without
the headers of PyTorch, for this processor, and kept beside Inductor's. A machine without a compiler runs the reference:
slower, the same bits, so the other ranks need not know.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ..integrations.c_library import built_library, failure_of
from ..reasons import log_once
from . import reference
from .message import GROUP_SIZE, MessageLayout
from .pieces import Piece

SOURCE = Path(__file__).with_name("codec.cpp")
# -O3 takes three times as long to compile this, and what it makes runs mostly 1.2 to 2.4 times as long (GCC 12, AVX2).
FLAGS = ("-std=c++17", "-O2", "-march=native")
WIDE = ("-ftree-vectorize", "-fvect-cost-model=dynamic")  # of GCC
STRICT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")  # the bits of the reference
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ENCODE, _REDUCE, _DECODE = range(3)


@functools.cache
def library(spikes: bool) -> Optional[Any]:
    """The compiled function, or None, with the reason logged once, where it cannot be compiled."""
    try:
        defines = (f"-DGROUP_SIZE={GROUP_SIZE}", f"-DSPIKE_RESERVING={str(spikes).lower()}")
        path = built_library(SOURCE, os.environ.get("CXX", "g++"), (*FLAGS, *STRICT, *defines), optional=WIDE)
        function = ctypes.CDLL(str(path)).intscale_codec
    except (OSError, subprocess.SubprocessError) as error:
        log_once(
            logging.WARNING,
            "quantized collectives on this CPU run as PyTorch operators, many times slower: no C++ compiler worked "
            f"(set CXX to one): {failure_of(error)}",
        )
        return None
    function.argtypes = [ctypes.c_int] * 4 + [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4 + [ctypes.c_int] * 2
    return function


def encode(x: Tensor, piece: Piece, layout: MessageLayout, messages: Tensor, skip: int) -> None:
    """As :func:`reference.encode`."""
    function = library(layout.spikes)
    if function is None:
        return reference.encode(x, piece, layout, messages, skip)
    dtype, width, message = DTYPES[x.dtype], x.element_size(), messages.data_ptr()
    for row in range(messages.shape[0]):
        start, stop = piece.bounds(row + (row >= skip))
        function(
            _ENCODE, dtype, layout.bits, 0, x.data_ptr() + start * width, None, message + row * layout.nbytes, stop - start,
            layout.groups, 0, layout.nbytes, 0, 1,
        )  # fmt: skip


def reduce(
    x: Tensor,
    received: Tensor,
    piece: Piece,
    rank: int,
    layout: MessageLayout,
    out: Tensor,
    out_layout: Optional[MessageLayout],
) -> None:
    """As :func:`reference.reduce`."""
    function = library(layout.spikes)
    if function is None:
        return reference.reduce(x, received, piece, rank, layout, out, out_layout)
    start, stop = piece.bounds(rank)
    target = out.data_ptr() + (0 if out_layout else piece.begin * x.element_size())
    function(
        _REDUCE, DTYPES[x.dtype], layout.bits, out_layout.bits if out_layout else 0, x.data_ptr() + start * x.element_size(),
        received.data_ptr(), target, stop - start, layout.groups, layout.nbytes, out_layout.nbytes if out_layout else 0,
        rank, received.shape[0] + 1,
    )  # fmt: skip


def decode(received: Tensor, piece: Piece, layout: MessageLayout, out: Tensor) -> None:
    """As :func:`reference.decode`."""
    function = library(layout.spikes)
    if function is None:
        return reference.decode(received, piece, layout, out)
    dtype, width, message = DTYPES[out.dtype], out.element_size(), received.data_ptr()
    for row in range(received.shape[0]):
        start, stop = piece.bounds(row)
        function(
            _DECODE, dtype, layout.bits, 0, None, message + row * layout.nbytes, out.data_ptr() + start * width, stop - start,
            layout.groups, layout.nbytes, 0, 0, 1,
        )  # fmt: skip
