"""``intscale bench``: what is timed is checked before, is not zero, and takes turns."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("typer", reason="typer is not installed: pip install 'intscale-compile[cli]'")

from intscale_compile import IntScaleConfig  # noqa: E402
from intscale_compile.commands import bench, bench_gemms  # noqa: E402
from intscale_compile.errors import CompileError  # noqa: E402
from tests.support.cli import in_process  # noqa: E402


@pytest.mark.slow
def test_cpu(capsys):
    options = ["--shape", "96x128", "--tokens", 3, "--seconds", 0.05, "--device", "cpu", "-c", "group_size=32"]
    code, stdout, _ = in_process(capsys, "bench", *options, "--json")
    (row,) = json.loads(stdout)
    assert code == 0 and (row["n"], row["k"], row["tokens"], row["reference"]) == (96, 128, 3, "fp32")
    assert row["ratio"] == pytest.approx(row["reference_us"] / row["ours_us"]) and row["ours_us"] > 0


def test_operands_are_random(monkeypatch):
    seen = []

    def look(reference, ours, what):
        seen.append((reference, ours))

    monkeypatch.setattr(bench, "_check", look)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # what is multiplied does not depend on it
    list(bench_gemms([(64, 128)], [2], IntScaleConfig(), device="cpu", seconds=0.01))
    ((reference, ours),) = seen
    assert (reference != 0).all() and (ours != 0).float().mean() > 0.9 and reference.unique().numel() > 100


def test_a_wrong_product_is_not_timed():
    x = torch.randn(4, 8)
    bench._check(x, x + 0.01 * torch.randn(4, 8), "64x64")
    for wrong in (torch.randn(4, 8), torch.zeros(4, 8), x * float("nan")):
        with pytest.raises(CompileError, match="64x64: the output is .* dB from the original's"):
            bench._check(x, wrong, "64x64")


def test_turns_alternate():
    calls = []
    functions = [lambda: calls.append("a"), lambda: calls.append("b")]
    times = bench._alternate(functions, 0.01)
    assert len(times) == 2 and all(time > 0 for time in times)
    assert set(calls[::2]) == {"a"} and set(calls[1::2]) == {"b"}
    assert len(calls) >= 2 * (bench.WARM_UP + bench.LEAST_TURNS)
