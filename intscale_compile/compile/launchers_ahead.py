"""C functions that launch Inductor's kernels, compiled in threads while Inductor writes the rest of the graph.

PyTorch launches its own kernels through one function that is compiled already, except those with launch attributes, such as
programmatic dependent launch (:mod:`~.inductor_settings`). For these Triton generates a C function for each
list of argument types and calls the C compiler, and Inductor's worker processes leave that to the main thread, which does it
for one kernel after the other when all else is done. Here it is done as soon as the source of a kernel is known: a thread
waits for the C compiler, and Triton's cache on disk has the function when the main thread asks for it.

Nothing depends on it: what was not compiled here is compiled where it was before. Releases of Triton without such functions
(3.9) and kernels without launch attributes are left alone.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Optional

log = logging.getLogger("intscale_compile")
THREADS = 8
_SIGNATURE = re.compile(r"'signature': (\{[^{}]*\})")
_OVERLAPPED = "'launch_pdl': True"


class _Metadata:
    """What a launcher wants to know about a kernel and its C function does not depend on."""

    tensordesc_meta = None

    def __getattr__(self, name: str) -> int:
        return 0


class LaunchersAhead:
    """The launchers of one graph's kernels.

    Attributes:
        compiled: types of arguments whose launchers were compiled, or found in Triton's cache.
    """

    def __init__(self) -> None:
        self.compiled: list[tuple] = []
        self._futures: dict[tuple, Future] = {}
        self._threads: Optional[ThreadPoolExecutor] = None

    def begin(self, source: str) -> None:
        """Compile the launcher of the kernel in ``source``, a module that Inductor wrote, in another thread."""
        signature = signature_of(source)
        if signature is None or _launcher_class() is None:
            return
        key = _form(signature)
        if key not in self._futures:
            self._threads = self._threads or ThreadPoolExecutor(THREADS, "intscale_launchers")
            self._futures[key] = self._threads.submit(self._compile, signature)

    def _compile(self, signature: dict[str, Any]) -> None:
        compile_launcher = _launcher_class()
        assert compile_launcher is not None
        compile_launcher(SimpleNamespace(constants={}, signature=signature), _Metadata())
        self.compiled.append(_form(signature))

    def wait(self) -> None:
        """Until every launcher that was begun is there: the main thread would only compile it a second time."""
        for future in self._futures.values():
            problem = future.exception()
            if problem is not None:
                log.info("a launcher could not be compiled ahead (%s: %s)", type(problem).__name__, problem)

    def finish(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)


def signature_of(source: str) -> Optional[dict[str, Any]]:
    """Types of the arguments by name; None for a kernel that PyTorch launches itself."""
    found = _SIGNATURE.search(source) if _OVERLAPPED in source else None
    return ast.literal_eval(found[1]) if found else None


def _form(signature: dict[str, Any]) -> tuple:
    """What the C function depends on: not on what a pointer points to."""
    return tuple("*" if type(kind) is str and kind.startswith("*") else kind for kind in signature.values())


def _launcher_class() -> Optional[Callable]:
    """Triton's class for NVIDIA GPUs, where creating one compiles a C function."""
    try:
        from triton.backends.nvidia import driver
    except ImportError:
        return None
    return getattr(driver, "CudaLauncher", None) if hasattr(driver, "make_launcher") else None


@contextlib.contextmanager
def launchers_ahead() -> Iterator[LaunchersAhead]:
    """Compile the launchers of what Inductor compiles in this context, and in this thread, in its worker processes."""
    from torch._inductor.async_compile import AsyncCompile

    ahead, thread = LaunchersAhead(), threading.get_ident()
    triton, wait = AsyncCompile.triton, AsyncCompile.wait

    def triton_begun(self, kernel_name, source_code, *args, **kwargs):
        result = triton(self, kernel_name, source_code, *args, **kwargs)
        if threading.get_ident() == thread and AsyncCompile.use_process_pool():
            ahead.begin(source_code)
        return result

    def wait_for_both(self, scope):
        if threading.get_ident() == thread:
            ahead.wait()
        return wait(self, scope)

    AsyncCompile.triton, AsyncCompile.wait = triton_begun, wait_for_both  # type: ignore[method-assign, assignment]
    try:
        yield ahead
    finally:
        AsyncCompile.triton, AsyncCompile.wait = triton, wait  # type: ignore[method-assign]
        ahead.finish()
