"""examples/text_classifier.py: its parts, the whole in a short form, and the whole as a user runs it."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "text_classifier.py"
SMALL = {"TOKENS": 16, "BATCH": 8, "WIDTH": 32, "WARMUP": 5, "LEARNING_RATE": 1e-2}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("text_classifier", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three labels, 80 texts each: words of the label's own among common ones; one label of too few texts."""
    choose, lines = random.Random(0), ["rare\tone text", "no label"]
    for label in ("fruit", "tools", "towns"):
        for _ in range(80):
            own = [f"{label[:3]}{choose.randrange(3)}" for _ in range(8)]
            words = own + [f"word{choose.randrange(10)}" for _ in range(3)]
            choose.shuffle(words)
            lines.append(f"{label}\t{' '.join(words)}")
    path = tmp_path_factory.mktemp("texts") / "texts.tsv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_not_longer_than_two_hundred_lines():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 200


def test_short_form(example, data, monkeypatch, capsys):
    for name, value in SMALL.items():
        monkeypatch.setattr(example, name, value)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # compiled in the slow test
    example.main(["--data", str(data), "--steps", "50"])
    out = capsys.readouterr().out
    assert "3 labels, 60 labelled texts, 124 unlabelled, 56 to test with" in out
    for name in ("supervised", "with UDA, ESimCSE and FGM"):
        assert float(re.search(rf"^{name}, 50 steps: ([\d.]+) % correct$", out, re.M)[1]) > 80
    assert re.search(r"bert\.encoder\.layer\.0\.attention\.self\.query\.weight +32 x 32 .* W4A8 ", out)
    rows = {m[1]: m[2].split(" | ") for m in re.finditer(r"^(fp32|quantize_|calibrate) +\| (.+)$", out, re.M)}
    assert rows["fp32"][1].strip() == rows["fp32"][3].strip() == "100.00 %" and rows["fp32"][4].strip() == "0.00000"
    for name in ("quantize_", "calibrate"):
        correct, same, _, attacked, kl, speed = (float(cell.split()[0]) for cell in rows[name])
        assert same > 90 and attacked > 60 and abs(correct - float(rows["fp32"][0].split()[0])) < 8
        assert 0 <= kl < 0.2 and speed > 0


def test_a_model_with_one_label_for_all_is_refused(example, data, monkeypatch):
    class Constant(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=torch.eye(3)[:1].expand(len(input_ids), -1))

    monkeypatch.setattr(example, "train", lambda *_, **__: Constant())
    with pytest.raises(SystemExit, match="collapsed to 1 of 3 labels: train it longer"):
        example.main(["--data", str(data)])
    lines = [line for line in data.read_text().splitlines() if not line.startswith("towns")]
    data.with_name("two.tsv").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match="collapsed to 1 of 2 labels"):  # half of the labels, but one for all
        example.main(["--data", str(data.with_name("two.tsv"))])
    data.with_name("one.tsv").write_text("a\tb\n" * 70)
    with pytest.raises(SystemExit, match="there are 1 labels with 60 texts or more, not 2"):
        example.main(["--data", str(data.with_name("one.tsv"))])


def test_words_left_out_and_repeated(example, monkeypatch):
    monkeypatch.setattr(example, "TOKENS", 5)
    ids, counts = torch.tensor([[1, 7, 8, 9, 0]]), torch.tensor([[1, 0, 2, 1, 1]])
    assert example.recounted(ids, counts).tolist() == [[1, 8, 8, 9, 0]]
    assert example.recounted(ids, torch.tensor([[1, 0, 0, 1, 0]])).tolist() == [[1, 9, 0, 0, 0]]
    assert example.recounted(ids, torch.tensor([[1, 2, 2, 2, 2]])).tolist() == [[1, 7, 7, 8, 8]]


@pytest.mark.parametrize("kind, distance", [("fgm", 1.0), ("pgd", 0.9)])
def test_an_attack_adds_the_gradients_at_the_moved_embeddings(example, kind, distance):
    table = torch.nn.Embedding(4, 3)
    model = torch.nn.Module()
    model.bert = torch.nn.Module()
    model.bert.embeddings = torch.nn.Module()
    model.bert.embeddings.word_embeddings = table
    before, seen, slope = table.weight.detach().clone(), [], torch.randn(4, 3)

    def loss():  # its gradient is the same everywhere
        seen.append((table.weight.detach() - before).norm().item())
        return (table.weight * slope).sum()

    loss().backward()
    example.add_attack(model, loss, kind)
    assert torch.equal(table.weight, before)
    torch.testing.assert_close(table.weight.grad, 2 * slope)
    assert seen[-1] == pytest.approx(distance, rel=1e-5) and len(seen) == (2 if kind == "fgm" else 4)


def test_functions_of_packages(example, tmp_path, monkeypatch):
    body = "\n".join(f"    value{i} = {i} * 1000" for i in range(10))
    for name in ("json/a.py", "json/inner/b.py", "test/c.py", "d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            f"import os\n\n\ndef f(x):\n{body}\n\n\nclass A:\n    def g(self):\n{body}\n\n    def h(self): pass\n"
        )
    monkeypatch.setattr(example.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = list(example.functions_by_package())
    assert [label for label, _ in found] == ["json"] * 4 and [text[:4] for _, text in found] == ["f(x)", "g(se"] * 2


@pytest.mark.slow
def test_as_a_user_runs_it(data):
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--steps", "80"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "13 of 14 linear layers quantized" in done.stdout  # the classifier has three rows only
    rows = re.findall(r"^(?:quantize_|calibrate) +\| +([\d.]+) % \| +([\d.]+) %", done.stdout, re.M)
    assert len(rows) == 2 and all(float(same) >= 97 for _, same in rows)
