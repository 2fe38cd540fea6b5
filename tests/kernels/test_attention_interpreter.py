"""Decode attention in Triton's interpreter, against PyTorch's attention in fp64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.support import interpreter_works

pytestmark = interpreter_works
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    """Error of every case, or None, by name."""
    command = [sys.executable, "-m", "tests.kernels._attention_interpreter_main"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines and done.returncode in (0, 1), done.stderr
    return {line["case"]: line["error"] for line in lines}


@pytest.mark.parametrize(
    "prefix",
    [
        *("one-tile/", "ragged/", "two-parts/", "features-80/", "two-steps/"),
        *("strided", "hidden-tail", "nothing-visible", "alone", "number-of-parts", "no-sequences"),
    ],
)
def test_decode_attention(results, prefix):
    chosen = {name: error for name, error in results.items() if name.startswith(prefix)}
    assert chosen, f"no case named {prefix}*: {sorted(results)}"
    failed = {name: error for name, error in chosen.items() if error is not None}
    first = next(iter(failed.values()), None)
    assert not failed, f"{len(failed)} of {len(chosen)} cases: {sorted(failed)}; the first:\n{first}"
