"""The lm-eval adapter on a local task: questions whose answer the trained model knows, and one file of text."""

from __future__ import annotations

import json
import math
import runpy
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'intscale-compile[eval]'")

from lm_eval.tasks import TaskManager  # noqa: E402

from intscale_compile import IntScaleTensor  # noqa: E402
from intscale_compile.errors import ConfigError, VersionError  # noqa: E402
from intscale_compile.integrations.lm_eval import IntScaleLM  # noqa: E402

CHOICES = """
task: python_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
TEXT = """
task: python_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.json}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
WORDS = [
    ("import os\nimport sys\n\n\ndef main(argv):\n    for name in", [" argv", " banana"], 0),
    ("class Queue:\n    def __init__(self, size):\n        self.size =", [" potato", " size"], 1),
    ("try:\n    value = int(text)\nexcept", [" ValueError", " yellow"], 0),
    ("if x is not None:\n    return x\nelse:\n    raise", [" lemon", " ValueError"], 1),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, models_dir):
    """Two task files with data beside them: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("tasks")
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out = (models_dir / "heldout_stdlib_modules.txt").read_text().splitlines()
    paths = [library / name for name in held_out if (library / name).is_file()]
    source = next(text for text in (path.read_text(errors="replace") for path in paths) if len(text) > 9000)
    words = [{"text": text, "choices": choices, "label": label} for text, choices, label in WORDS]
    (folder / "words.json").write_text("\n".join(map(json.dumps, words)))
    (folder / "text.json").write_text(json.dumps({"text": source[6000:9000]}))
    (folder / "words.yaml").write_text(CHOICES.format(folder=folder))
    (folder / "text.yaml").write_text(TEXT.format(folder=folder))
    return folder


def evaluate(model, tasks, **arguments):
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"device": "cpu", "dtype": "float32", **arguments} if isinstance(model, str) else None,
        tasks=["python_words", "python_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    return results["python_words"]["acc,none"], math.log(results["python_text"]["byte_perplexity,none"])


@pytest.fixture(scope="module")
def plain(models_dir, tasks):
    return evaluate("hf", tasks, pretrained=str(models_dir / "tiny-llama"))


@pytest.fixture(scope="module")
def first_layer(models_dir, tmp_path_factory):
    """The first layer of the trained model between its embeddings: quick to compile."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("first_layer")
    model = AutoModelForCausalLM.from_pretrained(models_dir / "tiny-llama", num_hidden_layers=1, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(models_dir / "tiny-llama").save_pretrained(folder)
    return str(folder)


def test_quantized_by_name(models_dir, tasks, plain):
    accuracy, loss = evaluate("intscale", tasks, pretrained=str(models_dir / "tiny-llama"), scale_search="absmax")
    print(f"nats per byte: fp32 {plain[1]:.4f}, absmax {loss:.4f}")
    assert plain[0] == accuracy == 1.0
    assert plain[1] < loss < 1.1 * plain[1]


def test_compiled(first_layer, tasks):
    options = {"pretrained": first_layer, "scale_search": "absmax", "group_size": 64}
    eager = evaluate("intscale", tasks, **options)
    model = IntScaleLM(device="cpu", dtype="float32", compile=True, **options)
    assert model.model.model.layers[0].mlp.up_proj.weight.group_size == 64
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = evaluate(model, tasks)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert compiled[0] == eager[0] and compiled[1] == pytest.approx(eager[1], rel=0.01)


def test_calibrated(models_dir, tasks, tmp_path, plain):
    text = tmp_path / "calibration.txt"
    text.write_text((Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text())
    folder = str(models_dir / "tiny-llama")
    with pytest.raises(ConfigError, match="calibration_text=FILE"):
        IntScaleLM(folder, device="cpu", preset="rtn")
    with pytest.raises(ConfigError, match="fewer than calibration_tokens=1000000"):
        IntScaleLM(folder, device="cpu", preset="rtn", calibration_text=text, calibration_tokens=1_000_000)
    options = {
        "calibration_text": text,
        "calibration_sequences": 2,
        "calibration_tokens": 128,
        "scale_search": "absmax",
    }
    model = IntScaleLM(folder, device="cpu", dtype="float32", preset="rtn", **options)
    assert isinstance(model.model.model.layers[7].mlp.down_proj.weight, IntScaleTensor)
    assert plain[1] < evaluate(model, tasks)[1] < 1.1 * plain[1]


def test_checkpoint_of_another_tool(models_dir, tasks, tmp_path, plain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.importing.test_import_models import written

    folder = models_dir / "tiny-llama"
    written("gptq", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model = IntScaleLM(str(tmp_path), device="cpu", dtype="float32")
    assert model.model.model.layers[0].mlp.up_proj.weight.scale_bits == 8
    accuracy, loss = evaluate(model, tasks)
    assert accuracy == 1.0 and plain[1] < loss < 1.1 * plain[1]
    with pytest.raises(ConfigError, match="quantized already"):
        IntScaleLM(str(tmp_path), device="cpu", preset="rtn")


def test_command_line_knows_the_model(first_layer, tasks, tmp_path, monkeypatch, capsys):
    """``python -m intscale_compile.integrations.lm_eval`` is lm-eval's command line."""
    command = ["lm_eval_model", "run", "--model", "intscale", "--device", "cpu"]
    command += ["--model_args", f"pretrained={first_layer},dtype=float32,scale_search=absmax"]
    command += ["--tasks", "python_words", "--include_path", str(tasks)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_module("intscale_compile.integrations.lm_eval", run_name="__main__", alter_sys=False)
    table = capsys.readouterr().out
    assert "python_words" in table and "intscale" in table


def test_message_where_lm_eval_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(VersionError, match=r"pip install 'intscale-compile\[eval\]'"):
        runpy.run_module("intscale_compile.integrations.lm_eval", run_name="without")
