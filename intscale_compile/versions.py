"""Versions of the packages below us that this release was run with."""

from __future__ import annotations

import importlib.metadata

from .errors import VersionError

__version__ = "0.2.0"
SUPPORTED = {"torch": ((2, 11), (2, 16)), "torchao": ((0, 18), None)}
# What the private names that we use (integrations/) were checked with, from and below; outside of it a warning is logged.
CHECKED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "torch": SUPPORTED["torch"],  # type: ignore[dict-item]
    "torchao": ((0, 18), (0, 19)),
    "transformers": ((5, 17), (5, 25)),
    "triton": ((3, 6), (3, 10)),
    "peft": ((0, 21), (0, 22)),
    "lm_eval": ((0, 4), (0, 5)),
    "vllm": ((0, 32), (0, 33)),
}


def _parse(text: str) -> tuple[int, ...]:
    numbers = []
    for piece in text.split("+")[0].split(".")[:2]:
        digits = "".join(c for c in piece if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def version_of(package: str) -> tuple[int, ...]:
    """Major and minor version of an installed package."""
    return _parse(importlib.metadata.version(package))


def fits_checked(package: str, version: str) -> bool:
    """Whether a version of a package is one that its private names were checked with."""
    low, high = CHECKED[package]
    return low <= _parse(version) < high


def check_versions() -> None:
    """Raise ``VersionError`` where an installed package is outside the supported range."""
    for package, (low, high) in SUPPORTED.items():
        found = importlib.metadata.version(package)
        if _parse(found) < low or (high is not None and _parse(found) >= high):
            wanted = f">={'.'.join(map(str, low))}" + (f",<{'.'.join(map(str, high))}" if high else "")
            raise VersionError(
                f"intscale_compile needs {package}{wanted}, found {found}: pip install '{package}{wanted}'"
            )
