"""The benchmark of generate on a CPU: its table, and a tiny model through the real processes."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.benchmarks import load

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bench():
    return load(("cpu_generate",)).cpu_generate


def test_medians_in_milliseconds_and_errors_in_their_row(bench):
    point = dict(first=[0.05, 0.03, 0.04], steps=[0.011, 0.0095, 0.01])
    found = {
        "fp32": dict(start_s=34.56, second_start_s=5.71, error=None, **{"1x32": point}),
        "int4": dict(start_s=None, second_start_s=None, error="RuntimeError: no kernel", **{"1x32": point}),
    }
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in bench.report(found, ["1x32"]).splitlines()
    ]
    assert rows[0] == ["peer", "first token, 1x32, ms", "a token, 1x32, ms", "first call, s", "in the next process, s"]
    assert rows[2:] == [["fp32", "40.0", "10.0", "34.6", "5.71"], ["int4", "RuntimeError: no kernel"]]


@pytest.mark.slow
def test_a_tiny_model_runs_from_end_to_end(bench, tmp_path, capsys):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=48
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    out = tmp_path / "found.json"
    arguments = ["--model", str(tmp_path / "m"), "--peers", "fp32", "ours", "--points", "1x8", "--new-tokens", "4"]
    assert bench.main([*arguments, "--rounds", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["results"]
    assert {len(found[name]["1x8"]["steps"]) for name in ("fp32", "ours")} == {6}
    assert all(found[name]["start_s"] > found[name]["second_start_s"] > 0 for name in found)
    assert "| ours |" in capsys.readouterr().out and torch.get_num_threads() > 0
