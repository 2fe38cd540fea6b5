"""The benchmark of host time, with one layer on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.benchmarks import BENCHMARKS, load

pytest.importorskip("transformers")


def test_table():
    bench = load(("host_time",)).host_time
    rows = bench.table({"bf16": [49.6, 163.0], "ours": [71.0, 290.4]}, [3, 32]).splitlines()
    assert rows == [
        "| us of the host | 3 layers | 32 layers |",
        "| --- | --- | --- |",
        "| bf16 | 50 | 163 |",
        "| ours | 71 | 290 |",
    ]


@pytest.mark.slow
def test_every_variant_runs(tmp_path):
    out = tmp_path / "us.json"
    command = [sys.executable, "host_time.py", "--layers", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["us"]
    assert len(figures) == 3 and all(10 < t < 1e5 for (t,) in figures.values())
