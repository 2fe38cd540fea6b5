"""Commands on a small model, in this process: quantize, inspect, eval and back, formats, numbers against Python's."""

from __future__ import annotations

import json
import math
import os
import re
import shutil

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, linears_and_experts
from intscale_compile.commands import (
    evaluate,
    load_model,
    load_tokenizer,
    quantize_folder,
    source_folder,
    stdlib_texts,
    token_sequences,
)
from intscale_compile.commands.evaluation import evaluate_tasks, read_texts
from intscale_compile.errors import CheckpointError, ConfigError
from tests.support.cli import in_process, save_small_llama

typer = pytest.importorskip("typer", reason="typer is not installed: pip install 'intscale-compile[cli]'")
transformers = pytest.importorskip("transformers")

WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps until the next morning begins " * 40


TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.json}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_small_llama(tmp_path_factory.mktemp("llama") / "model", WORDS)


@pytest.fixture(scope="module")
def quantized(llama, tmp_path_factory):
    """The same model, quantized in groups of 64; what the command says is in the next test."""
    out = tmp_path_factory.mktemp("quantized") / "model"
    quantize_folder(llama, out, {"group_size": 64}, progress=False)
    return out


def expected(llama, config):
    model, _ = load_model(llama)
    quantize_(model, config, filter_fn=linears_and_experts)
    return model


def test_quantize(capsys, llama, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = in_process(capsys, "quantize", llama, out, "-c", "group_size=64", "--json")
    summary = json.loads(stdout)
    assert (code, stderr) == (0, "")
    assert summary["config"]["group_size"] == 64 and summary["weights"] == 14
    assert [row["reason"] for row in summary["left_alone"]] == ["OUTPUT_EMBEDDING"]
    assert summary["bytes_after"] == (out / "model.safetensors").stat().st_size < summary["bytes_before"] / 2
    model, wanted = load_model(out)[0], expected(llama, IntScaleConfig(group_size=64))
    products = [p for p in wanted.parameters() if isinstance(p, IntScaleTensor)]
    assert summary["quantized_parameters"] == sum(p.numel() for p in products)
    assert math.isclose(summary["quantized_fraction"], summary["quantized_parameters"] / summary["parameters"])
    ids = torch.randint(320, (1, 16))
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert load_tokenizer(out)("the fox").input_ids == load_tokenizer(llama)("the fox").input_ids


def test_tables_are_printed(capsys, llama, quantized, text, tmp_path):
    code, stdout, _ = in_process(capsys, "quantize", llama, tmp_path / "out")
    assert code == 0 and "times smaller" in stdout and "lm_head.weight: OUTPUT_EMBEDDING" in stdout
    code, stdout, _ = in_process(capsys, "eval", quantized, "--text", text, "--against", llama, "--tokens", 32)
    assert code == 0 and "signal to noise" in stdout and "ratio" in stdout


def test_inspect(capsys, quantized, tmp_path):
    code, stdout, _ = in_process(capsys, "inspect", quantized, "--all", "--html", tmp_path / "page.html")
    assert code == 0 and stdout.count("W4A8") == 14 and "OUTPUT_EMBEDDING: output embedding" in stdout
    assert "14 of 15 linear layers quantized" in stdout and "model.layers.1.mlp.up_proj.weight" in stdout
    page = (tmp_path / "page.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "mlp.up_proj.weight" in page


def test_inspect_folds_repeated_layers(capsys, tmp_path):
    deep = save_small_llama(tmp_path / "deep", WORDS, num_hidden_layers=4)
    code, stdout, _ = in_process(capsys, "inspect", deep)
    assert code == 0 and stdout.count("W4A8") == 7 and "layers.0..3.mlp.up_proj" in stdout


def test_inspect_with_other_fields(capsys, tmp_path):
    one = save_small_llama(tmp_path / "one", WORDS, num_hidden_layers=1)
    code, stdout, _ = in_process(capsys, "inspect", one, "-c", "weight_bits=8", "--json", "--tokens", 8)
    layers = json.loads(stdout)["layers"]
    assert code == 0 and {x["weight_bits"] for x in layers if x["quantized"]} == {8} and layers[0]["tokens"] == "8"


def test_inspect_says_no(capsys, tmp_path):
    """Nothing to quantize in a model whose layers are too small: exit code 1."""
    tiny = save_small_llama(tmp_path / "tiny", WORDS, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    code, stdout, _ = in_process(capsys, "inspect", tiny)
    assert code == 1 and "NOTHING WAS QUANTIZED" in stdout and "TOO_SMALL" in stdout


def test_inspect_says_before_it_runs_that_the_page_has_no_folder(capsys, quantized, tmp_path, monkeypatch):
    from intscale_compile import commands

    monkeypatch.setattr(commands, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, _, stderr = in_process(capsys, "inspect", quantized, "--html", tmp_path / "no" / "page.html")
    assert code == 2 and f"{tmp_path}/no/page.html: No such file or directory: check the path" in stderr


def test_plan_reads_no_weights(capsys, llama, quantized, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    code, stdout, _ = in_process(capsys, "inspect", tmp_path, "--plan", "-c", "group_size=64", "--json")
    planned = json.loads(stdout)
    model, _ = load_model(quantized)
    stored = {n: p.nbytes_packed() for n, p in model.named_parameters() if isinstance(p, IntScaleTensor)}
    assert code == 0 and {x["name"]: x["bytes_after"] for x in planned["weights"] if x["quantized"]} == stored
    assert [x["reason"] for x in planned["weights"] if not x["quantized"]] == ["OUTPUT_EMBEDDING"]
    code, _, stderr = in_process(capsys, "inspect", quantized, "--plan")
    assert code == 2 and "is quantized already (torchao)" in stderr


def test_eval_against_the_original(capsys, llama, quantized, text):
    options = ["--text", text, "--sequences", 3, "--tokens", 32, "--json"]
    code, stdout, _ = in_process(capsys, "eval", quantized, *options, "--against", llama)
    result = json.loads(stdout)
    assert code == 0 and (result["sequences"], result["tokens"]) == (3, 32)
    ids = token_sequences(load_tokenizer(llama), [WORDS], 3, 32)
    assert ids[0, 0] == 0, "the text begins with the tokenizer's first token"
    models = [load_model(quantized)[0], load_model(llama)[0]]
    logits = [torch.cat([model(row[None]).logits for row in ids]).double() for model in models]
    losses = [torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for x in logits]
    assert result["perplexity"] == pytest.approx(losses[0].exp().item(), rel=1e-6)
    assert result["original_perplexity"] == pytest.approx(losses[1].exp().item(), rel=1e-6)
    snr = 10 * torch.log10(logits[1].square().sum() / (logits[0] - logits[1]).square().sum())
    assert result["snr_db"] == pytest.approx(snr.item(), rel=1e-5)
    ours, theirs = (x.log_softmax(-1) for x in logits)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert result["kl"] == pytest.approx(kl.item(), rel=1e-3) and result["kl"] > 0
    assert result["noise_floor_db"] > 15
    assert result["same_token"] == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())


def test_eval_of_equal_models(llama):
    model, _ = load_model(llama)
    result = evaluate(model, torch.randint(320, (2, 16)), model)
    assert result.snr_db is None and result.kl == 0 and result.same_token == 1 and result.noise_floor_db > 100
    assert result.perplexity == result.original_perplexity


def test_eval_bound(capsys, llama, text):
    options = ["eval", llama, "--text", text, "--tokens", 32, "--sequences", 1, "--json", "--max-perplexity"]
    assert in_process(capsys, *options, 1e6)[0] == 0
    code, stdout, _ = in_process(capsys, *options, 2)
    assert code == 1 and json.loads(stdout)["perplexity"] > 2


def test_trained_model_on_the_standard_library(models_dir):
    """The README's figure; some of its sequences here, so compared with the same sum over the same ids."""
    ids = token_sequences(load_tokenizer(models_dir / "tiny-llama"), stdlib_texts(), 2, 512)
    model, _ = load_model(models_dir / "tiny-llama", dtype=torch.float32)
    assert ids.shape == (2, 512) and 10 < evaluate(model, ids).perplexity < 25


def test_export_and_import_again(capsys, llama, quantized, tmp_path):
    """compressed-tensors holds the codes: what is imported from it multiplies with the same weights."""
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "exported"
    options = ["-c", "group_size=64", "--export", "compressed-tensors"]
    code, stdout, _ = in_process(capsys, "quantize", llama, out, *options, "--json")
    assert code == 0 and "compressed-tensors" in json.loads(stdout)["notes"][0]
    again = tmp_path / "again"
    code, stdout, _ = in_process(capsys, "quantize", out, again, "--json")
    assert code == 0 and json.loads(stdout)["method"] == "compressed-tensors"
    name = "model.layers.1.mlp.up_proj.weight"
    codes = [dict(load_model(folder)[0].named_parameters())[name].codes for folder in (quantized, again)]
    assert torch.equal(*codes)
    code, _, stderr = in_process(capsys, "quantize", out, tmp_path / "x", "-c", "group_size=64")
    assert code == 2 and "['group_size'] cannot be changed" in stderr
    code, stdout, _ = in_process(capsys, "inspect", out)
    assert code == 0 and "imported with its codes" in stdout


def test_a_quantized_model_is_exported(capsys, quantized, tmp_path):
    """One that intscale quantized is written for other engines; the codes are the same."""
    pytest.importorskip("compressed_tensors")
    code, _, stderr = in_process(capsys, "quantize", quantized, tmp_path / "out", "--export", "compressed-tensors")
    assert code == 0, stderr
    name = "model.layers.1.mlp.up_proj.weight"
    codes = [dict(load_model(folder)[0].named_parameters())[name].codes for folder in (quantized, tmp_path / "out")]
    assert torch.equal(*codes)


@pytest.mark.parametrize("export", [None, "compressed-tensors"])
def test_a_save_that_fails_leaves_nothing(export, llama, tmp_path, monkeypatch):
    """So the next try finds no folder in its way."""
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", None)
        with pytest.raises(TypeError):
            quantize_folder(llama, tmp_path / "out", export=export, progress=False)
    assert not list(tmp_path.iterdir())
    quantize_folder(llama, tmp_path / "out", export=export, progress=False)
    assert load_model(tmp_path / "out")


def test_verify(capsys, quantized, llama, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    out = shutil.copytree(quantized, tmp_path / "out")
    code, stdout, _ = in_process(capsys, "inspect", out, "--verify")
    assert code == 0 and re.fullmatch(r"\d+ tensors in 1 files are what was saved\n", stdout)
    path, key = out / "model.safetensors", "model.layers.1.mlp.up_proj._weight_qdata"
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[key][3, 5] ^= 1
    save_file(tensors, path, metadata=metadata)
    code, stdout, stderr = in_process(capsys, "inspect", out, "--verify", "--json")
    assert code == 1 and stdout == "" and len(stderr.splitlines()) == 1
    assert "model.layers.1.mlp.up_proj.weight: qdata: the data differ from their checksum" in stderr
    code, stdout, _ = in_process(capsys, "inspect", llama, "--verify", "--json")
    assert code == 1 and json.loads(stdout) == {"files": 1, "tensors": 0, "without_checksums": ["model.safetensors"]}


def test_text_that_is_not_utf_8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Füße".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.txt: byte 1 is not UTF-8.*convert the file"):
        read_texts([tmp_path / "latin.txt"])


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_pipe_is_not_waited_for(name, llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises((CheckpointError, ConfigError)):
        load_model(tmp_path)


def test_preset(capsys, llama, text, tmp_path):
    out = tmp_path / "out"
    options = ["--preset", "gptq", "--data", text, "--sequences", 2, "--tokens", 32, "-c", "damping=0.05", "--json"]
    for field in ("distillation_steps=9", "distillation=fresh", "statistics_tokens=64"):
        options += ["-c", field]
    code, stdout, _ = in_process(capsys, "quantize", llama, out, *options)
    summary = json.loads(stdout)
    assert any(note.startswith("not distilled") for note in summary["notes"])
    assert code == 0 and summary["method"] == "gptq" and summary["config"]["damping"] == 0.05
    assert list(summary["losses"]) == ["model.layers.0", "model.layers.1"] and summary["weights"] == 14
    ids = token_sequences(load_tokenizer(llama), [WORDS], 2, 32)
    original, _ = load_model(llama)
    plain = evaluate(expected(llama, IntScaleConfig()), ids, original)
    assert evaluate(load_model(out)[0], ids, original).snr_db > plain.snr_db, "worse than without calibration"


def test_tasks(llama, quantized, text, tmp_path):
    """A task of lm-eval with local data: the quantized model runs as it is, the plain one is not quantized."""
    tasks = pytest.importorskip(
        "lm_eval.tasks", reason="lm-eval is not installed: pip install 'intscale-compile[eval]'"
    )
    (tmp_path / "text.json").write_text(json.dumps({"text": WORDS[:200]}))
    (tmp_path / "text.yaml").write_text(TASK.format(folder=tmp_path))
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    tokenizer = load_tokenizer(llama)
    ids = torch.tensor([[0, *tokenizer(WORDS[:200]).input_ids]])
    for folder in (llama, quantized):
        model, _ = load_model(folder)
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        found = evaluate_tasks(model, tokenizer, ["words"], task_manager=manager)["words"]["byte_perplexity,none"]
        assert found == pytest.approx(math.exp(loss / 200), rel=1e-4)
    with pytest.raises(ConfigError, match="lm-eval has no task 'others'"):
        evaluate_tasks(model, tokenizer, ["others"], task_manager=manager)


def test_incomplete_checkpoint_is_refused(llama, tmp_path):
    """transformers would fill what is missing with random numbers."""
    from safetensors.torch import load_file, save_file

    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, first model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="header"):
        load_model(tmp_path)


def test_names_that_mean_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("")
    for name, said in {
        "/no/such": "no such folder",
        "./x": "no such folder",
        "models/x": "no such folder",
        "a/b/c": "no such folder",
        "models": "has no config.json",
        "file": "is not a folder",
        "owner/name": "could not be had from the hub",
    }.items():
        with pytest.raises(ConfigError, match=said):
            source_folder(name)


WRONG = {
    "quantize {llama} {out} -c group_sise=64": "did you mean group_size",
    "quantize {llama} {out} -c group_size=65": "use one of (32, 64, 128, 256, -1)",
    "quantize {llama} {out} -c group_size": "write name=value",
    "quantize {llama} {out} -c scale_bits=4 -c scale_bits=5": "given twice",
    "quantize {llama} {llama}": "is not an empty folder",
    "quantize {llama} {out} --preset gptq": "give text files with --data",
    "quantize {llama} {out} --preset gptk --data {text}": "there is no preset 'gptk'",
    "quantize {llama} {out} --preset gptq --data {out}/no": "there is no such file",
    "quantize {llama} {out} --preset gptq --data {text} --tokens 100000": "fewer than --tokens",
    "quantize {llama} {out} --data {text}": "name a preset with --preset",
    "quantize {llama} {out} --export gguf": "use 'compressed-tensors'",
    "quantize {llama} {out} --device tpu": "cannot be used here",
    "quantize {llama} {out} --dtype float8": "use float32, bfloat16, float16 or auto",
    "quantize {llama}": "Missing argument",
    "quantize {quantized} {out} --preset gptq --data {text}": "is quantized already",
    "quantize {quantized} {out}": "is quantized by intscale already: use it as it is",
    "quantize {quantized} {out} --export compressed-tensors -c scale_bits=8": "and no fields",
    "inspect {quantized} --verify --plan": "--verify reads files and runs nothing",
    "inspect {llama} --tokens 4096": "use 1 to 128",
    "inspect {llama} --tokens 0": "--tokens",
    "inspect {quantized} -c group_size=32": "leave it out",
    "inspect {llama} --plan --html x.html": "leave one of them out",
    "eval {llama}": "give one of --text FILE, --stdlib or --task NAME",
    "eval {llama} --stdlib --text {text}": "give one of",
    "eval {llama} --task x --against {llama}": "leave them out with --task",
    "eval {llama} --text {text} --tokens 2000": "fewer than --tokens 2000",
    "eval {llama} --text {text} --tokens 200": "more than the 128",
    "bench --shape 12": "write output x input features",
    "bench --tokens 0": "--tokens",
    "tune --shape 64": "write output x input features",
    "tune {quantized} --shape 64x64": "leave one of them out",
    "quantise": "No such command",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_use_is_one_line(capsys, command, llama, quantized, text, tmp_path):
    out = tmp_path / "out"
    words = command.format(llama=llama, out=out, text=text, quantized=quantized).split()
    code, stdout, stderr = in_process(capsys, *words)
    assert code == 2 and stdout == "" and not out.exists()
    assert len(stderr.splitlines()) == 1 and WRONG[command] in stderr and stderr.startswith("intscale")


def test_a_bug_is_one_line_too(capsys, llama, monkeypatch):
    from intscale_compile import commands

    def broken(*_, **__):
        raise KeyError("some\nthing")

    monkeypatch.setattr(commands, "load_model", broken)
    monkeypatch.delenv("INTSCALE_DEBUG", raising=False)
    code, _, stderr = in_process(capsys, "inspect", llama)
    assert code == 1 and len(stderr.splitlines()) == 1 and "KeyError" in stderr and "INTSCALE_DEBUG=1" in stderr
    monkeypatch.setenv("INTSCALE_DEBUG", "1")
    code, _, stderr = in_process(capsys, "inspect", llama)
    assert code == 1 and "Traceback" in stderr and stderr.splitlines()[-1].startswith("intscale: KeyError")
