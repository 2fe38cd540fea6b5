"""The example scripts, run as a user runs them but with a tiny training budget."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from intscale_compile import IntScaleConfig, IntScaleTensor

transformers = pytest.importorskip("transformers")

CHECKOUT = Path(__file__).resolve().parent.parent
QUICKSTART = CHECKOUT / "examples" / "quickstart.py"
SMALL = ["--sequences", "4", "--tokens", "64"]


def load_script(path) -> ModuleType:
    """A script as a module; ``examples`` is not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    if "intscale" not in torch.compiler.list_backends():
        pytest.skip('backend "intscale" is not registered: pip install -e .')
    return load_script(QUICKSTART)


@pytest.fixture(scope="module")
def first_run(quickstart, tmp_path_factory) -> SimpleNamespace:
    """One run with one layer of half the size, little text and twelve steps, and its cache folder."""
    cache, out, err = tmp_path_factory.mktemp("cache"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        smaller = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
        for name, value in smaller.items():
            patch.setitem(quickstart.ARCHITECTURE, name, value)
        patch.setattr(quickstart, "MAX_STEPS", 12)
        patch.setattr(quickstart, "WINDOW", 64)
        patch.setattr(quickstart, "TIMING_REPEATS", 1)
        patch.setattr(quickstart, "CORPUS_BYTES", 100_000)
        quickstart.main(["--train-seconds", "60", "--cache", str(cache), *SMALL])
    transformers.utils.logging.enable_progress_bar()
    return SimpleNamespace(out=out.getvalue(), err=err.getvalue(), cache=cache)


def perplexities(output: str) -> tuple[float, float]:
    before = re.search(r"^perplexity before: ([\d.]+)", output, re.M)
    after = re.search(r"^perplexity after: +([\d.]+)", output, re.M)
    return float(before[1]), float(after[1])


def test_first_run_prints_every_part(first_run, quickstart):
    out = first_run.out
    assert re.search(r"^trained [1-9]\d* steps", out, re.M)
    assert re.search(r"q_proj.* W4A8 ", out) and "7 of 8 linear layers quantized" in out
    text = out.split("sample from the quantized model:\n")[1]
    assert text.startswith(quickstart.PROMPT.rstrip()) and len(text) > len(quickstart.PROMPT) + 20
    for label in ("perplexity", "all parameters, MB", "quantized weights, MB", "compiled forward, ms"):
        assert re.search(rf"^{label} +[\d.]+ +[\d.]+ ", text, re.M), label


def test_quantization_keeps_the_perplexity(first_run):
    before, after = perplexities(first_run.out)
    assert 1 < before < 512  # a uniform guess over the vocabulary is 512
    assert abs(after / before - 1) < 0.15


def test_output_is_plain_where_it_is_no_terminal(first_run):
    assert "\r" not in first_run.out + first_run.err and "\x1b" not in first_run.out + first_run.err
    assert "training:" not in first_run.err  # no progress bar in a log file


@pytest.mark.slow
def test_as_a_command(tmp_path):
    command = [sys.executable, str(QUICKSTART), "--train-seconds", "8", "--cache", str(tmp_path), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0 and "14 of 15 linear layers quantized" in done.stdout, done.stderr
    before, after = perplexities(done.stdout)
    assert 1 < before < 2048 and abs(after / before - 1) < 0.15
    assert "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr


@pytest.mark.slow
def test_second_run_uses_the_cache(quickstart, first_run, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "train", lambda *_: pytest.fail("trained again"))
    quickstart.main(["--train-seconds", "60", "--cache", str(first_run.cache), *SMALL])
    out = capsys.readouterr().out
    assert "trained by an earlier run" in out
    assert perplexities(out)[0] == pytest.approx(perplexities(first_run.out)[0], rel=1e-3)
    assert len(list(first_run.cache.iterdir())) == 1  # no half-written folder stays


def test_changed_budget_or_seed_is_another_model(quickstart, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(quickstart, "train", lambda *_: trained.append(1))
    texts = quickstart.stdlib() / "email"
    monkeypatch.setattr(quickstart, "stdlib", lambda: texts)  # a few modules to learn tokens from
    options = ["--cache", str(tmp_path)]
    for extra in ([], [], ["--seed", "1"], ["--train-seconds", "2"]):
        quickstart.trained_model_folder(quickstart.parse_arguments(options + extra))
    assert len(trained) == 3 and len(list(tmp_path.iterdir())) == 3


def test_held_out_modules_are_not_trained_on(quickstart):
    held_out = [quickstart.stdlib() / name for name in quickstart.HELD_OUT]
    assert all(path.is_file() for path in held_out)
    assert not set(quickstart.read_sources(held_out)) & set(quickstart.training_texts(0))


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--model", "/no/such/folder"], "cannot load a model from '/no/such/folder': no such folder"),
        (["--model", "."], "cannot load a model from '.'"),
        (["--tokens", "1"], "--tokens"),
        (["--device", "abacus"], "'abacus' is not usable here"),
    ],
)
def test_wrong_argument_is_one_line(quickstart, tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        quickstart.main(arguments)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert complaint in error[-1]
    assert len([line for line in error if not line.startswith((" ", "usage:"))]) == 1


def test_parameter_bytes_counts_what_is_stored(quickstart):
    linear = torch.nn.Linear(256, 64)
    linear.weight = torch.nn.Parameter(IntScaleTensor.from_hp(linear.weight, IntScaleConfig()), requires_grad=False)
    codes, group_scales, row_scales = 64 * 256 // 2, 64 * 2, 64 * 4
    assert quickstart.parameter_bytes(linear) == {"weight": codes + group_scales + row_scales, "bias": 64 * 4}


def test_tour_of_the_graph(tmp_path, capsys):
    """Of a saved model, with as many layers as are folded into one line, but narrower than the script's own."""
    tour = load_script(CHECKOUT / "examples" / "inspect_graph.py")
    assert tour.load(None).config.num_hidden_layers == 4
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    tour.main(["--model", str(tmp_path / "model"), "--page", str(tmp_path / "page.html")])
    out = capsys.readouterr().out
    assert "21 of 22 linear layers quantized" in out and "model.layers.0..2.mlp.down_proj.weight" in out
    assert re.search(r"^\+w4a8_linear = intscale\.w4a8_linear\(", out, re.M) and "bits of headroom" in out
    assert re.search(r"^model\.layers\.0\.\.2\.mlp\.down_proj\.weight +decision +W4A8 -> EXCLUDED$", out, re.M)
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_perplexity_benchmark_gives_the_recorded_value(models_dir, capsys):
    """``shared/models/README.md`` records 14.512, on Python 3.11's standard library."""
    benchmark = load_script(CHECKOUT / "benchmarks" / "perplexity.py")
    benchmark.main([str(models_dir / "tiny-llama"), "--forms", "1"])
    value = float(re.search(r"^\| fp32 \| ([\d.]+) ", capsys.readouterr().out, re.M)[1])
    assert value == pytest.approx(14.512, abs=1e-3 if sys.version_info[:2] == (3, 11) else 1.0)
