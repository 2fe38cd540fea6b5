"""The benchmark scripts as modules, and sizes that their tests share."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))


GEMM = ("gemm", "gemm_report", "gemm_results", "gemm_peers", "roofline_svg", "timing")


def load(names: tuple[str, ...] = GEMM) -> SimpleNamespace:
    """The benchmark's modules; ``benchmarks`` is no package, its scripts see each other as a user's command does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return SimpleNamespace(**{name.rsplit(".", 1)[-1]: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


def inject_outliers(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """``benchmarks/outliers.py``: outlier channels put into a model without changing its function."""
    return load(("outliers",)).outliers.inject_outliers(*args, **kwargs)
