"""Lines that other libraries log while intscale_compile is imported, and that say nothing to our users.

Held back are just these, from just these versions, and only while the package imports them. Imports nothing heavy: it is
there before torch is.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import sys
from typing import NamedTuple, Optional


class Line(NamedTuple):
    """One line: its logger, the package and the versions that log it, its text, and whether it matters on a GPU."""

    logger: str
    package: str
    versions: tuple[str, ...]
    text: str
    matters_on_gpu: bool = False


LINES = (
    # Kernels of torchao for formats that are not ours; its wheel has them for GPUs only.
    Line("torchao", "torchao", ("0.18",), r"Failed to load \S*_C_(mxfp8|cutlass_90a)\S*\.so: .*", True),
    # torchao registers two of its enumerations in a way that torch announces the end of.
    Line(
        "torch.utils._pytree", "torch", ("2.13", "2.14", "2.15"),
        r"<enum '(KernelPreference|ScaleCalculationMode)'> is an Enum subclass and is now natively supported by .*",
    ),
)  # fmt: skip


class _Filter(logging.Filter):
    def __init__(self, line: Line):
        super().__init__()
        self.line = line

    def filter(self, record: logging.LogRecord) -> bool:
        if re.fullmatch(self.line.text, record.getMessage(), re.DOTALL) is None:
            return True
        return self.line.matters_on_gpu and _has_gpu()


def _has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def _version(package: str) -> Optional[str]:
    try:
        return ".".join(importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


_filters: list[tuple[logging.Logger, _Filter]] = []


def hold_back() -> None:
    """Hold the known lines back until :func:`let_through`."""
    for line in LINES:
        if _version(line.package) in line.versions:
            logger, held = logging.getLogger(line.logger), _Filter(line)
            logger.addFilter(held)
            _filters.append((logger, held))


def let_through() -> None:
    """Let everything through again."""
    while _filters:
        logger, held = _filters.pop()
        logger.removeFilter(held)
