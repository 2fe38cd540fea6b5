"""``benchmarks/encoders.py`` on a small encoder: its figures are those of the embeddings."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from tests.support.benchmarks import load
from tests.support.cli import save_small_llama

bench = load(("encoders",)).encoders
NAMES = ("the fox", "a lazy dog", "one old clock", "the tall ship", "my green hat")
VERBS = (
    "jumps over the fence",
    "sleeps until the next morning",
    "looks for another way home",
    "is seen by many people",
)
TEXT = "\n".join(f"{a.capitalize()} {b} and so on and on . Then {a} never {b} again ." for a in NAMES for b in VERBS)


@pytest.fixture
def folder(tmp_path):
    place = save_small_llama(tmp_path / "encoder", TEXT)  # for its tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(vocab_size=320, **sizes)).save_pretrained(place)
    tokenizer = hf.AutoTokenizer.from_pretrained(place)
    tokenizer.pad_token = "<s>"
    tokenizer.save_pretrained(place)
    (tmp_path / "text.txt").write_text(" = Heading = \n" + TEXT)
    return place


def test_sentences_are_cut_where_they_end():
    found = bench.sentences(" = Of a fox and of a dog in the field = \n" + TEXT, 3)
    assert len(found) == 3 and all(part.endswith(".") and "=" not in part for part in found)
    assert not bench.sentences("Too few words .", 3)


def test_likeness_counts_nearest_sentences():
    base = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=-1)
    same = bench.likeness(base, base)
    assert torch.allclose(same.cosines, torch.ones(4)) and bool(same.same.all())
    moved = base.clone()
    moved[1] = base[2]
    # 1 and 2 fell together, which takes 0's and 3's nearest away too.
    assert not bench.likeness(moved, base).same.any()
    assert bench.likeness(moved, base).cells()[0].endswith(f"({float((base[1] * base[2]).sum()):.4f})")


def test_table(folder, tmp_path, capsys):
    text = str(tmp_path / "text.txt")
    options = ["--text", text, "--sentences", "16", "--rows", "w8a8", "--presets", "encoder", "--calibration", text]
    bench.main([str(folder), *options])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cosines = {
        cells[0].strip(): float(cells[1].split()[0]) for cells in lines if cells[0].strip() in ("w8a8", "encoder")
    }
    assert len(cosines) == 2 and all(0.99 < cosine <= 1 for cosine in cosines.values())
    with pytest.raises(SystemExit):
        bench.main([str(folder), "--text", text, "--presets", "encoder"])
