"""What commands print: tables for people, JSON for machines. Everything that is not a result goes to stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .errors import debugging

PIPE_WIDTH = 240  # columns where there is no terminal: rows are not broken
NOISY = ("torchao", "torch.utils._pytree", "huggingface_hub", "transformers", "lm_eval", "datasets")


def quiet() -> None:
    """Keep libraries below us from logging to the terminal, and draw their bars on terminals only."""
    if not debugging():
        for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(variable, "error")
        warnings.filterwarnings("ignore", module=r"(torch|torchao|transformers|huggingface_hub)\b")
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "transformers" in sys.modules:  # it has read the variable already
            sys.modules["transformers"].utils.logging.disable_progress_bar()


def console() -> Console:
    """Standard output; wide where nobody looks at it."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_json(data: Any) -> None:
    """One JSON document; numbers that JSON lacks become null."""
    print(json.dumps(_plain(data), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[str] = ()) -> None:
    """A table; the columns in ``numbers`` are set to the right."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    console().print(table)


def print_lines(*lines: str) -> None:
    """Plain text."""
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)


def size(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
