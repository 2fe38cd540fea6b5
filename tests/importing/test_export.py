"""Export to compressed-tensors: the library reads the same weights, and the importer the same codes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, from_quantized, save_compressed_tensors, save_pretrained
from intscale_compile.errors import ConfigError
from intscale_compile.saving.checkpoint import attach_quantizer
from tests.support.quantized_checkpoints import quantize_groups, snr_db, tiny_llama

QUICK = {"scale_search": "absmax"}


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def quantized(model):
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, IntScaleTensor)
    }


def decompressed(folder):
    """Every quantized weight as compressed-tensors decompresses it, and the configuration as it reads it."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors decompresses these checkpoints")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    stored = tensors_of(folder)
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    layers: dict = {}
    for key, tensor in stored.items():
        name, _, part = key.rpartition(".")
        layers.setdefault(name, {})[part] = tensor
    weights = {}
    for name, parts in layers.items():
        schemes = [
            scheme
            for scheme in config.config_groups.values()
            if any(target == "Linear" or match_name(name, target) for target in scheme.targets)
        ]
        if "weight_scale" in parts:
            (scheme,) = schemes
            assert name not in config.ignore
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            weights[name] = compressor.decompress(parts, scheme)["weight"]
    return weights


def asymmetric(model):
    """Quantize every linear layer but lm_head with zero points."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = quantize_groups(module.weight, 128, False)
            tensor = IntScaleTensor.from_codes(
                (layer.codes - 8).to(torch.int8),
                layer.scale,
                group_size=128,
                zero_point=(layer.zero - 8).to(torch.int8),
            )
            module.weight = nn.Parameter(tensor, requires_grad=False)


CASES = {
    "group 128": lambda model: quantize_(model, IntScaleConfig(**QUICK)),
    "group 32, 8-bit scales": lambda model: quantize_(model, IntScaleConfig(group_size=32, scale_bits=8, **QUICK)),
    "ragged groups": lambda model: quantize_(model, IntScaleConfig(group_size=256, **QUICK)),
    "per channel": lambda model: quantize_(model, IntScaleConfig(group_size=-1, **QUICK)),
    "amplifier": lambda model: quantize_(model, IntScaleConfig(amplifier=1024, **QUICK)),
    "tiled": lambda model: quantize_(model, IntScaleConfig(packing_format="tiled", **QUICK)),
    "asymmetric": asymmetric,
    "down_proj in 8 bits": lambda model: quantize_(
        model,
        FqnToConfig(
            {
                r"re:.*down_proj": IntScaleConfig(weight_bits=8, **QUICK),
                r"re:.*(q|k|v|o|gate|up)_proj": IntScaleConfig(**QUICK),
            }
        ),
        filter_fn=None,
    ),
}


@pytest.mark.parametrize("storage", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, storage, tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    CASES[case](model)
    weights = quantized(model)
    assert len(weights) == 7
    report = save_compressed_tensors(model, tmp_path, storage=storage, scale_dtype=torch.float32)
    assert [row.name for row in report.layers] == list(weights) and report.unquantized == ["lm_head"]
    assert all(row.snr_db > 140 for row in report.layers)

    dense = decompressed(tmp_path)
    assert set(dense) == set(weights)
    for name, weight in weights.items():
        assert snr_db(weight.dequantize(torch.float64), dense[name]) > 130, name

    again, _ = from_quantized(tmp_path)
    for name, weight in quantized(again).items():
        assert torch.equal(weight.codes, weights[name].codes), name
        assert snr_db(weights[name].dequantize(torch.float64), weight.dequantize(torch.float64)) > 50
    ids = torch.randint(0, 96, (2, 16))
    assert snr_db(model(ids).logits, again(ids).logits) > 40


def test_scales_in_the_dtype_of_the_model(tmp_path):
    model = tiny_llama(torch.bfloat16)
    quantize_(model, IntScaleConfig(**QUICK))
    report = save_compressed_tensors(attach_quantizer(model), tmp_path)
    assert model.hf_quantizer is not None  # as it was
    stored = tensors_of(tmp_path)
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.bfloat16
    assert all(50 < row.snr_db < 75 for row in report.layers)


def test_tied_embeddings_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("intscale_compile.importing.export.SHARD_SIZE", "100KB")
    model = tiny_llama(tie_word_embeddings=True)
    quantize_(model, IntScaleConfig(**QUICK))
    save_compressed_tensors(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, report = from_quantized(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert report.unquantized == ["lm_head"]


def test_static_activation_scale(tmp_path):
    model = tiny_llama()
    quantize_(model, IntScaleConfig(**QUICK))
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.with_activation_scale(0.0375), requires_grad=False)
    save_compressed_tensors(model, tmp_path)
    weights = quantized(from_quantized(tmp_path)[0])
    for name, weight in weights.items():
        static = weight.activation_scale
        assert (static is None) == (name != "model.layers.1.mlp.up_proj")
        assert static is None or float(static) == pytest.approx(0.0375)


def test_transformers_reads_the_export(tmp_path):
    pytest.importorskip("compressed_tensors", reason="transformers reads the export with compressed-tensors")
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    quantize_(model, IntScaleConfig(**QUICK))
    save_compressed_tensors(model, tmp_path)
    ids = torch.randint(0, 96, (2, 16))
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert snr_db(model(ids).logits, other(ids).logits) > 30


def test_what_cannot_be_expressed_is_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(ConfigError, match="no weight of the model is quantized"):
        save_compressed_tensors(model, tmp_path)
    quantize_(model, IntScaleConfig(**QUICK))
    with pytest.raises(ConfigError, match="storage='gguf'"):
        save_compressed_tensors(model, tmp_path, storage="gguf")
    layer = model.model.layers[0].mlp.down_proj
    plain = layer.weight
    layer.weight = nn.Parameter(plain.with_rotation(128), requires_grad=False)
    with pytest.raises(ConfigError, match=r"layers.0.mlp.down_proj.weight: rotation=128"):
        save_compressed_tensors(model, tmp_path)
    tiny = IntScaleTensor.from_codes(plain.codes, torch.full((256, 3), 1e-30), group_size=128)
    layer.weight = nn.Parameter(tiny.to(torch.float16), requires_grad=False)
    with pytest.raises(ConfigError, match=r"layers.0.mlp.down_proj: a scale does not fit torch.float16"):
        save_compressed_tensors(model, tmp_path)
    with pytest.raises(ConfigError, match="not Linear"):
        save_compressed_tensors(nn.Linear(32, 32), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_loaded_quantized(tmp_path):
    """transformers keeps how it put the weights together; exporting must not ask it to take packed ones apart."""
    model = tiny_llama()
    quantize_(model, IntScaleConfig(**QUICK))
    save_compressed_tensors(model, tmp_path / "direct")
    save_pretrained(model, tmp_path / "ours")
    save_compressed_tensors(model, tmp_path / "saved before")
    loaded = type(model).from_pretrained(tmp_path / "ours")
    save_compressed_tensors(loaded, tmp_path / "loaded")
    assert loaded.hf_quantizer is not None, "as it was"
    wanted = tensors_of(tmp_path / "direct")
    for folder in ("saved before", "loaded"):
        found = tensors_of(tmp_path / folder)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), folder
        configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("direct", folder)]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_failed_export_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    """The old model, what else is in the folder, and nothing beside it; the next try replaces the model."""
    model = tiny_llama(num_hidden_layers=1)
    quantize_(model, IntScaleConfig(**QUICK))
    folder = tmp_path / "out"
    save_compressed_tensors(model, folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_text("of an earlier model in two files")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("intscale_compile.importing.export._add_to_config", None)
        with pytest.raises(TypeError):
            save_compressed_tensors(model, folder, scale_dtype=torch.float16)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    save_compressed_tensors(model, folder, scale_dtype=torch.float16)
    assert {path.name for path in folder.iterdir()} == {name for name in before if "of-00002" not in name}
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
