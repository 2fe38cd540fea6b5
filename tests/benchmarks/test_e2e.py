"""The end-to-end benchmark: a tiny model on the CPU through the real processes, and what it makes of results."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree

import pytest

from tests.support.benchmarks import BENCHMARKS, load

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bench():
    return load(("e2e", "e2e_parts.models", "e2e_parts.measure", "e2e_parts.report"))


@pytest.mark.slow
def test_a_tiny_model_runs_from_end_to_end(tmp_path):
    """Two peers in processes of their own, both kinds of points, table, JSON and picture."""
    out, picture = tmp_path / "run.json", tmp_path / "run.svg"
    command = [sys.executable, "e2e.py", "--model", "tiny", "--device", "cpu", "--peers", "bf16", "intscale"]
    command += [
        "--batches",
        "2",
        "--contexts",
        "128",
        "300",
        "--prompts",
        "16",
        "--json",
        str(out),
        "--svg",
        str(picture),
    ]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    run = json.loads(out.read_text())
    assert set(run["peers"]) == {"bf16", "intscale"}
    for result in run["peers"].values():
        assert (
            set(result["times_us"]) == {"decode 2", "decode 2 behind 300", "prefill 16"}
            and min(result["times_us"].values()) > 0
        )
        assert not result["errors"]
    assert run["peers"]["bf16"]["quantized_fraction"] == 0 and run["peers"]["intscale"]["quantized_fraction"] > 0.8
    assert "tok/s (" in done.stdout and " ms (" in done.stdout
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_ratios_are_speeds_over_bf16(bench):
    measure, report = bench.measure, bench.report
    decode, prefill = measure.Point("decode", 4), measure.Point("prefill", 512)
    base = measure.PeerResult("bf16", times_us={"decode 4": 3000.0, "prefill 512": 9000.0})
    ours = measure.PeerResult("intscale", times_us={"decode 4": 1000.0})
    results = {"bf16": base, "intscale": ours}
    assert report.ratio(results, "intscale", decode) == 3.0
    assert report.ratio(results, "intscale", prefill) is None
    assert report.cell(results, "intscale", decode) == "4000 tok/s (3.00)"
    assert report.cell(results, "intscale", prefill) == "-"
    assert report.cell(results, "bf16", prefill) == "9.00 ms"
    assert "| ours | 4000 tok/s (3.00) | - |" in report.table(results, [decode, prefill])


def test_nothing_is_timed_out_of_step_unless_a_process_died(bench):
    """Behind the deadline others may still compile on the same GPU."""
    parts = threading.Barrier(2), threading.Lock(), threading.Event()
    turns = bench.measure.Turns(*parts, deadline=time.time() + 60)
    other = threading.Thread(target=turns.meet)
    other.start()
    assert turns.meet()
    other.join()
    late = bench.measure.Turns(*parts, deadline=time.time() - 1)
    assert not late.meet() and not turns.meet()  # broken from then on
    parts[2].set()
    assert turns.meet()


def test_the_most_telling_points_come_first(bench):
    names = [p.name for p in bench.e2e.interleaved([1, 16, 64], [2048, 512], [128])]
    assert names == ["decode 1", "prefill 2048", "decode 16", "prefill 512", "decode 64"]
    names = [p.name for p in bench.e2e.interleaved([1, 16], [], [8192, 128])]
    assert names == ["decode 1 behind 8192", "decode 16 behind 8192", "decode 1", "decode 16"]


def test_the_shared_attention_equals_transformers_own(bench):
    import torch
    from transformers import StaticCache

    logits = {}
    for attention in ("sdpa", bench.models.ATTENTION):
        model = bench.models.build("tiny", None, attention, "cpu")
        cache = StaticCache(config=model.config, max_batch_size=2, max_cache_len=32)
        ids = torch.arange(24).view(2, 12)
        with torch.no_grad():
            first = model(ids[:, :11], past_key_values=cache, use_cache=True).logits
            second = model(ids[:, 11:], past_key_values=cache, use_cache=True, position_ids=torch.tensor([[11]])).logits
        logits[attention] = torch.cat([first, second], 1).float()
    torch.testing.assert_close(*logits.values(), rtol=0.02, atol=0.02)


def test_without_a_gpu_one_line_says_what_to_do(bench):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="--device cpu"):
        bench.e2e.main([])
