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
