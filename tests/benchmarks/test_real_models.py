"""``benchmarks/real_models.py`` on a small model: its figures are those of the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig
from intscale_compile.commands import load_model, load_tokenizer, token_sequences
from tests.support.benchmarks import load
from tests.support.cli import save_small_llama

bench = load(("real_models",))
WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps until the next morning begins " * 40


def test_table(tmp_path, capsys):
    folder = save_small_llama(tmp_path / "llama", WORDS)
    (tmp_path / "words.txt").write_text(WORDS)
    options = ["--rows", "w8a8", "torchao int8 + int8", "--sequences", "3", "--tokens", "32"]
    bench.real_models.main([str(folder), "--text", f"words={tmp_path / 'words.txt'}", *options])
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[1].strip(): cells[2:] for line in lines if line.startswith("|") for cells in [line.split("|")]}
    assert {"w8a8", "torchao int8 + int8"} <= set(rows) and "default" not in rows
    ids = token_sequences(load_tokenizer(folder), [WORDS], 3, 32)
    plain, _ = load_model(folder, dtype=torch.float32)
    served, _ = load_model(folder, dtype=torch.float32)
    quantize_(served, IntScaleConfig(weight_bits=8, group_size=-1))

    def loss(model):
        return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    wanted = 100 * math.expm1(float(loss(served) - loss(plain)))
    assert float(rows["w8a8"][0].split()[0]) == pytest.approx(wanted, abs=0.006)
    with pytest.raises(SystemExit):
        bench.real_models.main([str(folder), "--text", f"a={tmp_path / 'words.txt'}", "--presets", "gptq"])


def test_wide_layers_and_distillation(tmp_path, capsys):
    """The row of a preset whose first block's down projection has 8 bits, distilled, with its bits a weight."""
    folder = save_small_llama(tmp_path / "llama", WORDS)
    text = str(tmp_path / "words.txt")
    (tmp_path / "words.txt").write_text(WORDS)
    options = ["--calibration", text, "--calibration-sequences", "4", "--distill-sequences", "8", "--distill", "2"]
    options += ["--step-sequences", "2", "--set", "group_size=32", "--sequences", "2", "--tokens", "32", "--rows"]
    found = []
    for more in ([], ["--wide", r".*layers\.0\..*down_proj"]):
        bench.real_models.main([str(folder), "--text", f"words={text}", *options, "--presets", "rtn", *more])
        captured = capsys.readouterr()
        (cells,) = [line.split("|") for line in captured.out.splitlines() if line.startswith("| rtn")]
        found.append(float(cells[5]))
        assert "Distillation(" in captured.err
    assert 4 < found[0] < 5 and found[1] > found[0] + 0.3


def test_best_says_whether_it_was_distilled(tmp_path, capsys):
    """It gets all of the calibration text and takes for its statistics what it is told to."""
    folder = save_small_llama(tmp_path / "llama", WORDS)
    text = str(tmp_path / "words.txt")
    (tmp_path / "words.txt").write_text(WORDS)
    options = ["--calibration", text, "--calibration-sequences", "8", "--sequences", "2", "--tokens", "32", "--rows"]
    fields = ["tuning_steps=1", "statistics_tokens=64", "distillation_steps=2", "distillation_tokens=64"]
    bench.real_models.main([str(folder), "--text", f"a={text}", *options, "--presets", "best", "--set", *fields])
    assert "best: distilled: 2 steps of about 64 tokens" in capsys.readouterr().err


def test_configuration_keeps_a_presets_own_wide_layers():
    config = bench.real_models.configuration("llama3", ["group_size=32"], "up_proj")
    assert [config.config_of(f"layers.0.mlp.{n}").weight_bits for n in ("up_proj", "down_proj", "gate_proj")] == [
        8,
        8,
        4,
    ]
