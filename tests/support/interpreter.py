"""Cases that run in Triton's interpreter: a process runs them and prints one line of JSON each, a test reads the lines.

The process is its own because ``TRITON_INTERPRET`` is read when triton is imported; import this module there first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def interpret() -> None:
    """Switch the interpreter on; before triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"


def run_cases(cases: Iterable[tuple[str, Callable[[], None]]]) -> int:
    """Run every case and print ``{"case": ..., "error": null | text}``; 1 if one failed."""
    failures = 0
    for name, check in cases:
        try:
            check()
            error = None
        except Exception:
            error = traceback.format_exc()
            failures += 1
        print(json.dumps({"case": name, "error": error}), flush=True)
    return int(failures != 0)


def results_of(module: str, package: str = "tests.kernels") -> dict[str, str | None]:
    """Error of every case of ``<package>.<module>``, or None, by name."""
    command = [sys.executable, "-m", f"{package}.{module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines and done.returncode in (0, 1), done.stderr
    return {line["case"]: line["error"] for line in lines}


def assert_passed(results: dict[str, str | None], prefix: str) -> None:
    """All cases whose names begin with ``prefix`` passed, and there are some."""
    chosen = {name: error for name, error in results.items() if name.startswith(prefix)}
    assert chosen, f"no case named {prefix}*: {sorted(results)}"
    failed = {name: error for name, error in chosen.items() if error is not None}
    first = next(iter(failed.values()), None)
    assert not failed, f"{len(failed)} of {len(chosen)} cases: {sorted(failed)}; the first:\n{first}"
