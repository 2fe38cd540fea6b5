"""Helpers shared by tests: code generation for a GPU that is not there, and inspection of machine code."""

from importlib.metadata import PackageNotFoundError, version

import pytest


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return (0,)


interpreter_works = pytest.mark.skipif(
    _release("triton") < (3, 7) and _release("numpy") >= (2, 4),
    reason="the interpreter of triton 3.6 makes an index of a 1-element array, which numpy 2.4 refuses",
)
"""Mark of tests that run kernels in Triton's interpreter."""
