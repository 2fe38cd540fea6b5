"""Shared libraries compiled on this machine from sources of this package, by its own compiler, at first use.

They need neither the headers of PyTorch nor those of Python, so that compiling takes a fraction of a second. They are kept
beside Inductor's.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from ..reasons import log_once

_COMPILER_SECONDS = 300


def built_library(
    source: Path, compiler: str, flags: Sequence[str], libraries: Sequence[str] = (), optional: Sequence[str] = ()
) -> Path:
    """The shared library of ``source``, compiled unless the same was compiled here before.

    Args:
        source: one C or C++ file.
        compiler: the command.
        flags: in front of the source; they are part of the name under which the library is kept.
        libraries: behind the source, such as ``-ldl``.
        optional: flags that are left out where the compiler does not know them.

    Raises:
        OSError: there is no such compiler.
        subprocess.SubprocessError: it failed, or took minutes.
    """
    if optional:
        with contextlib.suppress(subprocess.SubprocessError):
            return built_library(source, compiler, (*flags, *optional), libraries)
    # Slow to import.
    from torch._inductor.runtime.runtime_utils import cache_dir

    command = [compiler, *flags, "-shared", "-fPIC", str(source), *libraries, "-o"]
    key = "\0".join([source.read_text(), *command, _processor()])
    folder = Path(cache_dir()) / "intscale"
    path = folder / f"{source.stem}_{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            subprocess.run([*command, scratch], check=True, capture_output=True, text=True, timeout=_COMPILER_SECONDS)
            os.replace(scratch, path)  # other processes compile at the same time
        finally:
            Path(scratch).unlink(missing_ok=True)
    return path


def compiled_function(
    source: Path, name: str, flags: Sequence[str], types: Sequence[Any], consequence: str, optional: Sequence[str] = ()
) -> Optional[Any]:
    """A function of a compiled C++ source that returns nothing, or None, where it cannot be compiled; that is logged once.

    Args:
        source: one file.
        name: of the function.
        flags: of the compiler.
        types: of the arguments, of ctypes.
        consequence: what happens without it, for the log.
        optional: flags that are left out where the compiler does not know them.
    """
    compiler = os.environ.get("CXX", "g++")
    try:
        path = built_library(source, compiler, ("-std=c++17", *flags), optional=optional)
        function = getattr(ctypes.CDLL(str(path)), name)
    except (OSError, subprocess.SubprocessError) as error:
        log_once(
            logging.INFO,
            f"{consequence}, several times slower with the same result: no C++ compiler worked (set CXX to one): "
            f"{failure_of(error)}",
        )
        return None
    function.argtypes, function.restype = list(types), None
    return function


def failure_of(error: Exception) -> str:
    """What the compiler said, in one short text."""
    return str(getattr(error, "stderr", None) or error).strip()[:300]


def _processor() -> str:
    """What ``-march=native`` means here: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
