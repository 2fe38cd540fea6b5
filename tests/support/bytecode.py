"""Bytecode of a checkout that is new: each process of pytest-xdist would compile every file, so each begins with its share."""

from __future__ import annotations

import importlib.util
import py_compile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("intscale_compile", "intscale_cli", "tests/support")


def compile_share(config: pytest.Config) -> None:
    """Compile every n-th file of what this run collects and imports, where it has no bytecode yet; n processes do so at once.

    Asserts of test files are rewritten by pytest, whose own functions are called for it; without them nothing is done here.
    """
    number, count = int(config.workerinput["workerid"].removeprefix("gw")), config.workerinput["workercount"]  # type: ignore[attr-defined]
    tests = sorted(file for name in config.args for file in _test_files(config.rootpath / name.partition("::")[0]))
    for file in tests[number::count] if len(tests) >= 3 * count else ():
        _rewrite(config, file)
    for file in sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))[number::count]:
        if not Path(importlib.util.cache_from_source(str(file))).is_file():
            py_compile.compile(str(file), quiet=1)


def _test_files(path: Path) -> Iterable[Path]:
    return path.rglob("test_*.py") if path.is_dir() else [path]


def _rewrite(config: pytest.Config, file: Path) -> None:
    try:
        from _pytest.assertion.rewrite import PYC_TAIL, _rewrite_test, _write_pyc, assertstate_key, get_cache_dir
    except ImportError:
        return
    bytecode = get_cache_dir(file) / (file.stem + PYC_TAIL)
    if not bytecode.is_file():
        bytecode.parent.mkdir(exist_ok=True)
        status, code = _rewrite_test(file, config)
        _write_pyc(config.stash[assertstate_key], code, status, bytecode)
