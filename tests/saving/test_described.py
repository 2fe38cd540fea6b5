"""What ``config.json`` says of stored weights: damaged descriptions, other dtypes, and classes with or without a head."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torchao.quantization import quantize_

from intscale_compile import (
    IntScaleConfig,
    IntScaleTensor,
    from_quantized,
    linears_and_experts,
    load_safetensors,
    save_pretrained,
    save_safetensors,
)
from intscale_compile.commands import load_model, meta_model
from intscale_compile.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")

QUICK = IntScaleConfig(group_size=32, scale_search="absmax")
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=48)


def quantized(name, dtype=torch.float32, **more):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**SMALL, **more)).to(dtype).eval().requires_grad_(False)
    quantize_(model, QUICK, filter_fn=linears_and_experts)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("described") / "llama"
    save_pretrained(quantized("LlamaForCausalLM", num_key_value_heads=1), folder, QUICK)
    return folder


ASKED = transformers.TorchAoConfig(QUICK)
DOORS = {
    "by its class": lambda path: transformers.LlamaForCausalLM.from_pretrained(path),
    "by an auto class": lambda path: transformers.AutoModelForCausalLM.from_pretrained(path),
    "with a configuration": lambda path: transformers.AutoModel.from_pretrained(path, quantization_config=ASKED),
    "from_quantized": from_quantized,
    "load_model": load_model,
    "meta_model": meta_model,
}


@pytest.mark.parametrize("stored", [[1], "torchao", 4, False, {}, {"quant_method": []}], ids=str)
def test_a_description_that_is_none(stored, llama):
    """transformers fails on its type before it asks for a quantizer, each release with an error of its own."""
    path = llama / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": stored}))
    what = r"cannot be used \(quant_method=" if isinstance(stored, dict) else r"cannot be used \(.* is no object"
    try:
        for door in DOORS.values():
            with pytest.raises(
                CheckpointError, match=f"llama: config.json: its quantization_config {what}.*save the model again"
            ):
                door(llama)
    finally:
        path.write_text(json.dumps(config))


def test_a_description_that_is_gone_is_not_replaced_by_the_caller(llama, tmp_path):
    """The stored weights would be left lying, and random ones quantized."""
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for more in ({}, {"quantization_config": ASKED}):
        with pytest.raises(CheckpointError, match="is stored quantized, but config.json has no quantization_config"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **more)


def test_folders_of_others_are_transformers_to_refuse(tmp_path):
    model = transformers.LlamaModel(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": [1]}))
    with pytest.raises(AttributeError, match="to_dict"):
        transformers.AutoModel.from_pretrained(tmp_path)


PAIRS = {
    "BertForMaskedLM": {},
    "LlamaForCausalLM": {"num_key_value_heads": 1},
    "MixtralForCausalLM": {"num_key_value_heads": 1, "num_local_experts": 2},
}


@pytest.mark.parametrize("name", PAIRS)
def test_with_a_head_and_without(name, tmp_path):
    """A base model from the folder of a model with a head, and the other way round, as plain folders load."""
    model = quantized(name, **PAIRS[name])
    save_pretrained(model, tmp_path / "head", QUICK)
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    ids = torch.arange(12)[None]
    wanted = model.base_model(ids).last_hidden_state
    assert type(base).__name__ == name.partition("For")[0] + "Model"
    assert torch.equal(base(ids).last_hidden_state, wanted)
    save_pretrained(base, tmp_path / "base", QUICK)
    again = type(model).from_pretrained(tmp_path / "base")
    assert torch.equal(again.base_model(ids).last_hidden_state, wanted)
    weights = [p for p in again.parameters() if isinstance(p, IntScaleTensor)]
    assert len(weights) == sum(isinstance(p, IntScaleTensor) for p in base.parameters()) > 3


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_weights_have_the_dtype_that_is_asked_for(name, tmp_path):
    """As plain weights have, whose conversion changes what a model computes around them (T5 casts to its weight's dtype)."""
    save_pretrained(quantized(name, torch.bfloat16, **PAIRS[name]), tmp_path, QUICK)
    for dtype, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)):
        model, _ = load_model(tmp_path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {wanted} == {model.config.dtype}
        assert model(torch.arange(8)[None]).logits.dtype == wanted


def test_modules_that_stay_in_fp32(tmp_path):
    """T5 names one: its dtype decides how the block computes."""
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=64, d_ff=96, num_layers=1, num_heads=2, d_kv=32, vocab_size=48)
    model = transformers.T5EncoderModel(config).to(torch.bfloat16).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "plain")
    quantize_(model, QUICK)
    save_pretrained(model, tmp_path / "quantized", QUICK)
    for folder in ("plain", "quantized"):
        found = transformers.T5EncoderModel.from_pretrained(tmp_path / folder, dtype=torch.float16)
        kept = [name for name, p in found.named_parameters() if p.dtype == torch.float32]
        assert kept == ["encoder.block.0.layer.1.DenseReluDense.wo.weight"]


@pytest.mark.parametrize(
    "named, message", [("model-2.safetensors", "it is missing"), ("/etc/hostname", "outside of its folder")]
)
def test_files_that_an_index_names(named, message, llama, tmp_path):
    """transformers opened the one elsewhere, whatever it was, and a missing one ended in FileNotFoundError."""
    for path in llama.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    with safe_open(llama / "model.safetensors", "pt") as file:
        index = dict.fromkeys(file.keys(), "model-1.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": {**index, "more": named}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    for door in (transformers.AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(CheckpointError, match=f"{message}|not inside of it"):
            door(tmp_path)


@pytest.mark.parametrize("device", ["meta", "zzz"])
def test_a_device_that_cannot_be_read_to_is_not_called_damage(device, tmp_path):
    save_safetensors(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match=f"device='{device}' cannot be used here"):
        load_safetensors(tmp_path / "m.safetensors", device=device)
