"""``launcher.c``, compiled by the C compiler that Triton uses: starts a sequence of kernels whose parameters are written down.

Triton's own launcher looks at every argument at every launch, and makes three tensor maps: 100 to 200 us of the host for one
of our products.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, Optional

from ..integrations.c_library import built_library, failure_of
from ..reasons import log_once

SOURCE = Path(__file__).with_name("launcher.c")
DRIVER = "libcuda.so.1"
VARIABLE = "INTSCALE_PREPARED_LAUNCHES"  # 0: every launch through Triton
_int, _u64, _pointer = ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p


class CannotPrepare(Exception):
    """A call cannot be written down as a sequence of launches; the text says why."""


@functools.cache
def library() -> Optional[Any]:
    """The compiled launcher, or None, with the reason logged once, where there is none."""
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        return open_library(DRIVER)
    except (OSError, subprocess.SubprocessError) as error:
        log_once(
            logging.WARNING,
            "eager calls start kernels through Triton's launcher, several times slower: no C compiler worked "
            f"(set CC to one): {failure_of(error)}",
        )
    return None


def open_library(driver: str) -> Any:
    """The launcher, compiled where needed, on the CUDA driver of that file name.

    Raises:
        OSError: no compiler, no driver, or a driver that lacks a function (CUDA 12.4 has all).
    """
    # Only GPUs need Triton.
    import triton

    compiler = os.environ.get("CC") or next((c for c in ("gcc", "clang", "cc") if shutil.which(c)), "cc")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    made = ctypes.CDLL(str(built_library(SOURCE, compiler, ("-std=c11", "-O2", f"-I{include}"), ("-ldl",))))
    made.intscale_new.restype = _pointer
    made.intscale_new.argtypes = [_int]
    made.intscale_free.argtypes = [_pointer]
    made.intscale_add_launch.argtypes = [
        _pointer,
        _u64,
        _pointer,
        _int,
        _int,
        _int,
        ctypes.c_char_p,
        _int,
        _pointer,
        _pointer,
        _int,
    ]
    made.intscale_add_pointer.argtypes = [_pointer, _int, _int, _u64]
    made.intscale_add_map.argtypes = [
        _pointer, _int, _int, _u64, _u64, _int, _pointer, _pointer, _pointer, _int, _int,
    ]  # fmt: skip
    made.intscale_run.argtypes = [_pointer, _int, _u64, ctypes.c_char_p]
    if made.intscale_open(driver.encode()):
        raise OSError(f"{driver} is missing, or lacks a function that CUDA 12.4 has")
    return made


def _array(kind: Any, values: Items[int]) -> Any:
    return (kind * len(values))(*values)


class LaunchList:
    """Launches behind one another, in memory of the launcher.

    Args:
        made_by: :func:`library`.
        slots: how many addresses a call gives.
    """

    def __init__(self, made_by: Any, slots: int):
        self._library = made_by
        self.handle = made_by.intscale_new(slots)
        if not self.handle:
            raise CannotPrepare(f"{slots} addresses")
        self.pack = struct.Struct(f"{slots}Q").pack
        self.run = made_by.intscale_run

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.intscale_free(self.handle)

    def add(
        self, function: int, grid: Items[int], threads: int, shared: int, overlap: bool, block: bytes,
        offsets: Items[int], sizes: Items[int],
    ) -> None:  # fmt: skip
        """A launch; ``block`` holds its parameters, each at its offset."""
        u32 = ctypes.c_uint32
        grid = (*grid, 1, 1)[:3]
        self._check(
            self._library.intscale_add_launch(
                self.handle, function, _array(u32, grid), threads, shared, overlap, block, len(block), _array(u32, offsets),
                _array(u32, sizes), len(offsets),
            )
        )  # fmt: skip

    def add_pointer(self, offset: int, slot: int, add: int) -> None:
        """At ``offset`` of the last launch's block comes the address in ``slot`` plus ``add``."""
        self._check(self._library.intscale_add_pointer(self.handle, offset, slot, add))

    def add_map(
        self, offset: int, slot: int, add: int, address: int, sizes: Items[int], strides: Items[int], box: Items[int],
        kind: int, swizzle: int,
    ) -> None:  # fmt: skip
        """At ``offset`` comes a tensor map of the driver's type ``kind``; sizes, strides (bytes), box in PyTorch's order."""
        self._check(
            self._library.intscale_add_map(
                self.handle, offset, slot, add, address, len(sizes), _array(_u64, sizes[::-1]),
                _array(_u64, strides[-2::-1]), _array(ctypes.c_uint32, box[::-1]), kind, swizzle,
            )
        )  # fmt: skip

    @staticmethod
    def _check(code: int) -> None:
        if code:
            known = {
                -1: "more than the launcher holds",
                -3: "the kernel has other parameters than Triton's signature says",
            }
            raise CannotPrepare(known.get(code, f"CUDA error {code}"))
