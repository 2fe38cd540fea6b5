"""Damaged and unsupported checkpoints: one clear error each."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from intscale_compile import from_quantized
from intscale_compile.errors import CheckpointError, ConfigError
from tests.support.quantized_checkpoints import (
    awq_parts,
    compressed_parts,
    compressed_scheme,
    gptq_parts,
    quantize_groups,
    tiny_llama,
    write_checkpoint,
)

LAYER = "model.layers.1.mlp.down_proj"
GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"}


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=2, attention_bias=False)


@pytest.fixture(scope="module")
def written_gptq(source, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("gptq")

    def parts(name, weight):
        layer = quantize_groups(weight, 128, True)
        return layer, gptq_parts(layer)

    return write_checkpoint(source, tmp_path, "gptq", parts, GPTQ).folder


@pytest.fixture(scope="module")
def written_awq(source, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("awq")

    def parts(name, weight):
        layer = quantize_groups(weight, 128, False)
        return layer, awq_parts(layer)

    return write_checkpoint(source, tmp_path, "awq", parts, {"bits": 4, "group_size": 128, "version": "gemm"}).folder


@pytest.fixture(scope="module")
def written_compressed(source, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("compressed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors makes these checkpoints")
    scheme = compressed_scheme(symmetric=False)

    def parts(name, weight):
        layer = quantize_groups(weight, 128, False, torch.float32)
        return layer, compressed_parts(layer, weight, scheme)

    config = {"config_groups": {"group_0": scheme}, "format": "pack-quantized", "ignore": ["lm_head"]}
    return write_checkpoint(source, tmp_path, "compressed-tensors", parts, config).folder


@pytest.fixture
def gptq(written_gptq, tmp_path):
    return shutil.copytree(written_gptq, tmp_path / "gptq")


@pytest.fixture
def awq(written_awq, tmp_path):
    return shutil.copytree(written_awq, tmp_path / "awq")


@pytest.fixture
def compressed(written_compressed, tmp_path):
    return shutil.copytree(written_compressed, tmp_path / "compressed")


def change_tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def without(part):
    return lambda state: state.pop(f"{LAYER}.{part}")


def replaced(part, new):
    def change(state):
        state[f"{LAYER}.{part}"] = new(state[f"{LAYER}.{part}"])

    return change


TENSORS = {
    "no qweight": ("gptq", without("qweight"), "down_proj: qweight is missing"),
    "no scales": ("gptq", without("scales"), "down_proj: scales is missing"),
    "no qzeros": ("gptq", without("qzeros"), "down_proj: qzeros is missing"),
    "no layer": ("gptq", lambda s: [without(p)(s) for p in ("qweight", "qzeros", "scales", "g_idx")], "not in the checkpoint"),
    "no norm": ("gptq", lambda s: s.pop("model.norm.weight"), "model.norm.weight: not in the checkpoint"),
    "short qweight": ("gptq", replaced("qweight", lambda t: t[:-16]), "down_proj: scales has shape"),
    "fewer rows": ("gptq", replaced("qweight", lambda t: t[:, :-8]), "down_proj: scales has shape"),
    "float qweight": ("gptq", replaced("qweight", lambda t: t.float()), "qweight is torch.float32, not torch.int32"),
    "1-D qweight": ("gptq", replaced("qweight", lambda t: t.flatten()), "qweight has 1 dimensions"),
    "integer scales": ("gptq", replaced("scales", lambda t: t.int()), "scales is torch.int32, not floating point"),
    "NaN scales": ("gptq", replaced("scales", lambda t: t * float("nan")), "down_proj: a scale is NaN or Inf"),
    "8-bit codes": ("gptq", replaced("qweight", lambda t: torch.cat([t, t])), "down_proj: scales has shape"),
    "g_idx of another layer": ("gptq", replaced("g_idx", lambda t: t[:128]), "down_proj: g_idx has shape"),
    "unequal groups in g_idx": ("gptq", replaced("g_idx", lambda t: t.clamp(max=1)), "down_proj: g_idx does not divide the 384"),
    "negative groups in g_idx": ("gptq", replaced("g_idx", lambda t: t - 1), "down_proj: g_idx .* groups of 128 features each"),
    "another model's shape": ("gptq", lambda s: [s.update({f"{LAYER}.{p}": s[f"{LAYER}.{p}".replace("down", "up")].clone()})
                                                  for p in ("qweight", "qzeros", "scales", "g_idx")],
                              "stored and expected shapes differ: .*down_proj.weight"),
    "a layer too many": ("gptq", lambda s: s.update({f"model.layers.9.mlp.up_proj.{p}": s[f"{LAYER}.{p}"].clone()
                                                     for p in ("qweight", "qzeros", "scales")}),
                         "the model has no place for model.layers.9"),
    "a bias that is not zero": ("gptq", lambda s: s.update({f"{LAYER}.bias": torch.ones(256)}),
                                "the model has no place for .*down_proj.bias"),
    "nothing quantized": ("gptq", lambda s: [s.pop(name) for name in list(s) if "_proj" in name], "nothing is quantized in it"),
    "awq: no qzeros": ("awq", without("qzeros"), "down_proj: qzeros is missing where zero_point is true"),
    "awq: no scales": ("awq", without("scales"), "down_proj: scales is missing"),
    "awq: short qzeros": ("awq", replaced("qzeros", lambda t: t[:-1]), "down_proj: qzeros has shape"),
    "no weight_scale": ("compressed", without("weight_scale"), "down_proj: weight_scale is missing"),
    "no weight_shape": ("compressed", without("weight_shape"), "down_proj: weight_shape is missing"),
    "no weight_packed": ("compressed", without("weight_packed"), "down_proj: weight_packed is missing"),
    "no zero point": ("compressed", without("weight_zero_point"), "down_proj: weight_zero_point is missing"),
    "wrong weight_shape": ("compressed", replaced("weight_shape", lambda t: t * 2), "down_proj: weight_packed has shape"),
    "negative weight_shape": ("compressed", replaced("weight_shape", lambda t: -t), "down_proj: weight_shape is"),
    "short scales": ("compressed", replaced("weight_scale", lambda t: t[:, :-1]), "down_proj: weight_scale has shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_damaged_tensors(case, request):
    fixture, change, message = TENSORS[case]
    folder = request.getfixturevalue(fixture)
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        from_quantized(folder)


def scheme_of(config):
    return config["config_groups"]["group_0"]


CONFIGS = {
    "3 bits": ("gptq", lambda c: c.update(bits=3), "bits=3"),
    "8 bits": ("gptq", lambda c: c.update(bits=8), "bits=8"),
    "no bits": ("gptq", lambda c: c.pop("bits"), "bits=None"),
    "marlin": ("gptq", lambda c: c.update(checkpoint_format="marlin"), "checkpoint_format='marlin'"),
    "marlin, as AutoGPTQ says it": ("gptq", lambda c: c.update(is_marlin_format=True), "checkpoint_format='marlin'"),
    "groups of 16": ("gptq", lambda c: c.update(group_size=16), "group size 16"),
    "groups of 0": ("gptq", lambda c: c.update(group_size=0), "group size 0"),
    "8 bits in one layer": ("gptq", lambda c: c.update(dynamic={r"+:.*\.1\.mlp\.down": {"bits": 8}}), f"{LAYER}: .*bits=8"),
    "bitsandbytes": ("gptq", lambda c: c.update(quant_method="bitsandbytes"), "quant_method='bitsandbytes'"),
    "awq: 3 bits": ("awq", lambda c: c.update(bits=3), "bits=3"),
    "awq: gemv": ("awq", lambda c: c.update(version="gemv"), "version='gemv'"),
    "awq: llm-awq": ("awq", lambda c: c.update(backend="llm-awq"), "AutoAWQ"),
    "3-bit weights": ("compressed", lambda c: scheme_of(c)["weights"].update(num_bits=3), "int3 weights"),
    "8-bit packed": ("compressed", lambda c: scheme_of(c)["weights"].update(num_bits=8), "int8 weights"),
    "float weights": ("compressed", lambda c: scheme_of(c)["weights"].update(type="float"), "float4 weights"),
    "another format": ("compressed", lambda c: scheme_of(c).update(format="marlin-24"), "does not accept|marlin-24"),
    "unknown strategy": ("compressed", lambda c: scheme_of(c)["weights"].update(strategy="rows"), "does not accept"),
    "act-order": ("compressed", lambda c: scheme_of(c)["weights"].update(actorder="group"), "actorder|does not accept"),
    "fp8 activations": (
        "compressed",
        lambda c: scheme_of(c)["input_activations"].update(type="float"),
        "input_activations are not symmetric int8",
    ),
    "kv cache": ("compressed", lambda c: c.update(kv_cache_scheme={"num_bits": 8, "strategy": "tensor"}), "kv_cache_scheme"),
    "transforms": ("compressed", lambda c: c.update(transform_config={"config_groups": {"R3": {}}}), "transform_config"),
    "no targets": ("compressed", lambda c: c.update(config_groups={}), "no config_groups"),
    "other targets": ("compressed", lambda c: scheme_of(c).update(targets=["re:.*q_proj"]), "no target of config_groups selects"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_unsupported_configurations(case, request):
    fixture, change, message = CONFIGS[case]
    folder = request.getfixturevalue(fixture)
    change_config(folder, change)
    with pytest.raises(ConfigError, match=message):
        from_quantized(folder)


def test_scattered_compressed_groups(compressed):
    change_tensors(compressed, lambda s: s.update({f"{LAYER}.weight_g_idx": torch.zeros(384, dtype=torch.int32)}))
    with pytest.raises(ConfigError, match=rf"{LAYER}: its groups are scattered"):
        from_quantized(compressed)


@pytest.mark.parametrize("scale", [float("nan"), 0.0, -0.5, float("inf")])
def test_static_activation_scales_name_the_layer(scale, compressed):
    """What stores one scale per weight said no name."""
    static = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    change_config(compressed, lambda c: scheme_of(c).update(input_activations=static))
    layers = lambda s: [name.removesuffix(".weight_packed") for name in s if name.endswith(".weight_packed")]  # noqa: E731
    change_tensors(compressed, lambda s: s.update({f"{name}.input_scale": torch.tensor([0.1]) for name in layers(s)}))
    change_tensors(compressed, lambda s: s.update({f"{LAYER}.input_scale": torch.tensor([scale])}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}: input_scale is {scale}, not a positive number"):
        from_quantized(compressed)


# --- zero points that the configuration denies -------------------------------------------------------------------------


def symmetric_gptq(source, folder, stored, **config):
    """A symmetric checkpoint whose stored zero points are those of the layout ``stored``."""

    def parts(name, weight):
        layer = quantize_groups(weight, 128, True)
        return layer, gptq_parts(layer, stored)

    return write_checkpoint(source, folder, "gptq", parts, {**GPTQ, "sym": True, **config})


@pytest.mark.parametrize(
    "label, stored", [("gptq", "gptq_v2"), (None, "gptq_v2"), ("gptq_v2", "gptq"), ("gptq", "gptq")]
)
def test_symmetric_gptq_with_the_zero_points_of_the_other_layout(label, stored, source, tmp_path, caplog):
    """Symmetric means 8 for every group, which says how zero points were stored, whatever the label says."""
    checkpoint = symmetric_gptq(source, tmp_path, stored, checkpoint_format=label)
    model, report = from_quantized(tmp_path)
    for name, original in checkpoint.originals.items():
        weight = model.get_submodule(name).weight
        assert weight.zero_point is None and torch.equal(weight.codes.long() + 8, original.codes), name
    expected = 0 if (label or "gptq") == stored else len(checkpoint.originals)
    assert len(report.notes) == expected and ("read as 8 for all groups" in str(report)) == bool(expected)
    assert ("read as 8" in caplog.text) == bool(expected)


def test_asymmetric_gptq_keeps_its_zero_points(source, tmp_path):
    """9 for all groups is what an asymmetric checkpoint may hold; and what one without ``sym`` does not."""
    checkpoint = symmetric_gptq(source, tmp_path, "gptq_v2", sym=False)
    name = next(iter(checkpoint.originals))
    assert bool((from_quantized(tmp_path)[0].get_submodule(name).weight.zero_point == 1).all())


def test_symmetric_gptq_with_other_zero_points(gptq):
    change_config(gptq, lambda c: c.update(sym=True))
    change_tensors(gptq, replaced("qzeros", lambda t: t + 1))
    with pytest.raises(CheckpointError, match=rf"{LAYER}: its qzeros holds zero points from 8 to 9 where sym=true"):
        from_quantized(gptq)


def test_awq_without_zero_points_that_has_some(awq):
    change_config(awq, lambda c: c.update(zero_point=False))
    with pytest.raises(CheckpointError, match=r"qzeros holds zero points from \d+ to \d+ where zero_point=false"):
        from_quantized(awq)


def test_awq_without_zero_points_that_stores_those_of_symmetric_codes(source, tmp_path):
    def parts(name, weight):
        layer = quantize_groups(weight, 128, True)
        return layer, awq_parts(layer)

    config = {"bits": 4, "group_size": 128, "zero_point": False}
    checkpoint = write_checkpoint(source, tmp_path, "awq", parts, config)
    model, _ = from_quantized(tmp_path)
    for name, original in checkpoint.originals.items():
        assert torch.equal(model.get_submodule(name).weight.codes.long() + 8, original.codes)


def test_symmetric_compressed_tensors_with_zero_points(compressed):
    change_config(compressed, lambda c: scheme_of(c)["weights"].update(symmetric=True))
    with pytest.raises(
        CheckpointError, match=r"weight_zero_point holds zero points from \d+ to \d+ where symmetric=true"
    ):
        from_quantized(compressed)
    change_tensors(  # those of symmetric codes, as some releases store them
        compressed, lambda s: [t.fill_(-2004318072) for name, t in s.items() if name.endswith("zero_point")]
    )
    weight = from_quantized(compressed)[0].get_submodule(LAYER).weight
    assert weight.zero_point is None


# --- files ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_read_outside_of_the_folder(gptq, tmp_path):
    (gptq / "model.safetensors").rename(gptq.parent / "elsewhere.safetensors")
    names = load_file(gptq.parent / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(gptq.parent / "elsewhere.safetensors"), "..", "", 5, None):
        (gptq / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
        with pytest.raises(CheckpointError, match="not inside of it: nothing is read there"):
            from_quantized(gptq)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_pipe_is_not_waited_for(name, gptq):
    if name.endswith("index.json"):
        (gptq / "model.safetensors").unlink()
    (gptq / name).unlink(missing_ok=True)
    os.mkfifo(gptq / name)
    with pytest.raises(CheckpointError, match=f"{name}: it is not a regular file"):
        from_quantized(gptq)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text, message",
    [("[" * 200_000, "nested too deeply"), ("\udcff{}", "no JSON"), ("{", "no JSON"), ("null", "no JSON object")],
)
def test_json_that_cannot_be_read(name, text, message, gptq):
    if name.endswith("index.json"):
        (gptq / "model.safetensors").unlink()
    (gptq / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=message):
        from_quantized(gptq)


WRONG_TYPES = [
    {"architectures": 5}, {"architectures": [5]}, {"architectures": {"a": 1}}, {"architectures": ["AutoConfig"]},
    {"hidden_size": "wide"}, {"hidden_size": [64]}, {"num_attention_heads": 0}, {"num_hidden_layers": None}, {"dtype": "float12"},
    {"dtype": 7}, {"dtype": "nn"}, {"quantization_config": 3}, {"quantization_config": {"quant_method": ["gptq"]}},
    {"model_type": 5}, {"model_type": ["llama"]}, {"vocab_size": -1}, {"rope_parameters": "long"}, {"hidden_act": 3},
]  # fmt: skip
WRONG_TYPES += [
    {"quantization_config": {"quant_method": "gptq", **GPTQ, **wrong}}
    for wrong in ({"bits": []}, {"group_size": "128"}, {"group_size": True},
                  {"dynamic": 5}, {"dynamic": {"(": {}}}, {"dynamic": {"+:.*": 5}}, {"sym": "yes"})
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=str)
def test_wrong_types_in_config(wrong, gptq):
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises((ConfigError, CheckpointError)):
        from_quantized(gptq)


def test_damaged_files(gptq):
    with pytest.raises(FileNotFoundError):
        from_quantized(gptq / "nowhere")
    weights = gptq / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        from_quantized(gptq)
    weights.unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        from_quantized(gptq)
    index = gptq / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        from_quantized(gptq)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        from_quantized(gptq)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors"):
        from_quantized(gptq)


def test_a_model_that_transformers_does_not_know(gptq):
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForRhymes"]}))
    with pytest.raises(ConfigError, match="LlamaForRhymes"):
        from_quantized(gptq)
    (gptq / "config.json").write_text(json.dumps(config | {"model_type": "rhymes"}))
    with pytest.raises(ConfigError, match="cannot read this config.json"):
        from_quantized(gptq)
