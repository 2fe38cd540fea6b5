"""The benchmark of compile times: its table, and a tiny model on the CPU through the real processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.benchmarks import BENCHMARKS, load

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bench():
    return load(("compile_time",)).compile_time


def result(point: str, variant: str, seconds: float, **others) -> dict:
    times = dict(seconds=seconds, dynamo=2.0, passes=1.0, inductor=20.0, waiting=4.0, run=3.0, ahead=[], late=[])
    return dict(times, point=point, variant=variant) | others


def test_ratios_are_medians_over_those_of_the_same_point(bench):
    results = [result("decode", "bf16", s) for s in (20.0, 40.0, 22.0)]
    ahead = [dict(kernels=6, ready=5, seconds=4.21)]
    results += [result("decode", "ours", s, ahead=ahead) for s in (33.0, 20.0, 100.0)]
    results.append(result("prefill", "ours, at first launch", 50.0, late=["gemm_pipelined", "x", "gemm_pipelined"]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in bench.table(results).splitlines()]
    assert rows[2] == ["decode 1, bf16", "22.0", "1.00", "2.0", "1.0", "20.0", "4.0", "3.0", "-", "-"]
    assert rows[3] == ["decode 1, ours", "33.0", "1.50", "2.0", "1.0", "20.0", "4.0", "3.0", "5 of 6 in 4.2 s", "-"]
    assert rows[4][:3] == ["prefill 2048, ours, at first launch", "50.0", "-"]
    assert rows[4][-1] == "2 gemm_pipelined, 1 x" and len(rows) == 5


@pytest.mark.slow
def test_a_failing_process_is_told(bench):
    args = bench.parse(["--model", "tiny", "--layers", "1", "--device", "cpu"])
    with pytest.raises(RuntimeError, match="nowhere, bf16: exit [12]"):
        bench.run_child(args, "nowhere", "bf16")


@pytest.mark.slow
def test_a_tiny_model_runs_from_end_to_end(tmp_path):
    out = tmp_path / "times.json"
    command = [sys.executable, "compile_time.py", "--model", "tiny", "--device", "cpu", "--json", str(out)]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [r["variant"] for r in found] == ["bf16", "ours", "ours, at first launch"] * 2
    assert all(r["seconds"] > r["inductor"] > 0 and r["seconds"] > r["run"] > 0 for r in found)
    assert all(r["ahead"][0]["kernels"] == 0 for r in found if r["variant"] == "ours")  # there is no GPU
