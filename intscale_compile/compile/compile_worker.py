"""The process that compiles kernels ahead, see :mod:`~intscale_compile.compile.compile_ahead`.

Of the package it imports the kernels' modules only, without the package's ``__init__``: most of them need Triton alone.
Standard input is ``{"begun": time, "target": [backend, arch, warp_size], "kernels": [{"module", "name", "specialization"}]}``;
each kernel is answered by a line ``{"name", "seconds" since begun, "error": text or null}``. It needs no GPU and asks for
none: the compiled kernels and the C functions that launch them are left in Triton's cache on disk.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from typing import Any


class _Target:
    """A driver that knows for which GPU to compile, and nothing else."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0


def compile_one(module: str, name: str, specialization: str) -> None:
    """Compile a kernel for the active driver's target, and its launcher where it is NVIDIA's."""
    # Only GPUs need Triton.
    from triton.runtime import driver

    kernel = getattr(importlib.import_module(module), name)
    compiled = kernel.preload(specialization)
    if driver.active.get_current_target().backend == "cuda":
        # Only GPUs need Triton.
        from triton.backends.nvidia import driver as nvidia

        # Without libcuda.so there is none, and later releases (3.9) generate none: not a reason to call the kernel failed.
        with contextlib.suppress(AssertionError, AttributeError):
            nvidia.CudaLauncher(compiled.src, compiled.metadata)


def main() -> int:
    """Compile what standard input asks for."""
    # Only GPUs need Triton.
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    request = json.load(sys.stdin)
    driver.set_active(_Target(GPUTarget(*request["target"])))
    for one in request["kernels"]:
        error = None
        try:
            compile_one(**one)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        answer = dict(name=one["name"], seconds=time.time() - request["begun"], error=error)
        print(json.dumps(answer), flush=True)
    return 0
