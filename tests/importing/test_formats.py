"""Single layers of every format: unusual groups, scales and zero points; options; the report."""

from __future__ import annotations

import json
import math

import pytest
import torch

from intscale_compile import IntScaleTensor, from_quantized, save_pretrained
from intscale_compile.errors import ConfigError, OverflowProofError
from intscale_compile.importing.awq import AwqFormat
from intscale_compile.importing.compressed import CompressedTensorsFormat
from intscale_compile.importing.gptq import GptqFormat
from intscale_compile.importing.layers import QuantizedLayer, ScaleOptions, to_intscale
from intscale_compile.tensors.from_codes import scale_rounding_snr
from tests.support.quantized_checkpoints import (
    Original,
    awq_parts,
    compressed_parts,
    compressed_scheme,
    gptq_parts,
    quantize_groups,
    snr_db,
    tiny_llama,
    write_checkpoint,
)


def random_layer(n=48, k=512, group_size=128, scale=None, zeros=True):
    groups = 1 if group_size == -1 else -(-k // group_size)
    scale = torch.rand(n, groups) + 0.3 if scale is None else scale
    zero = torch.randint(0, 16, (n, groups)) if zeros else torch.full((n, groups), 8)
    return Original(torch.randint(0, 16, (n, k)), scale.half(), zero, group_size)


def converted(layer: QuantizedLayer, **options) -> IntScaleTensor:
    return to_intscale(layer, "layer", torch.float32, ScaleOptions(**options))[0]


def read_gptq(layer, version="gptq"):
    config = {"bits": 4, "group_size": layer.group_size, "checkpoint_format": version}
    return GptqFormat(config).read("layer", gptq_parts(layer, version))


def assert_same_weight(tensor, layer, decibels=50.0):
    assert snr_db(layer.weight, tensor.dequantize(torch.float64)) > decibels


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_reads_codes_and_zero_points(version):
    layer = random_layer()  # zero points 0 to 15: 0 is stored as 15 by "gptq"
    assert layer.zero.min() == 0 and layer.zero.max() == 15
    read = read_gptq(layer, version)
    assert torch.equal(read.codes.long() + 8, layer.codes)
    assert torch.equal(read.zero_point.long() + 8, layer.zero)
    assert torch.equal(read.scale, layer.scale.float())
    assert_same_weight(converted(read), layer)


def test_awq_reads_codes_and_zero_points():
    layer = random_layer(group_size=64)
    read = AwqFormat({"bits": 4, "group_size": 64}).read("layer", awq_parts(layer))
    assert torch.equal(read.codes.long() + 8, layer.codes)
    assert torch.equal(read.zero_point.long() + 8, layer.zero)
    assert torch.equal(read.scale, layer.scale.float())


def test_awq_is_read_as_compressed_tensors_converts_it():
    autoawq = pytest.importorskip(
        "compressed_tensors.entrypoints.convert.converters", reason="compressed-tensors converts AutoAWQ checkpoints"
    )
    generator = torch.Generator().manual_seed(3)
    words = lambda *shape: torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)  # noqa: E731
    parts = {"qweight": words(512, 6), "qzeros": words(4, 6), "scales": torch.rand(4, 48).half()}
    converter = autoawq.AutoAWQConverter(group_size=128)
    theirs = {
        name.removeprefix("layer."): tensor
        for name, tensor in converter.process({f"layer.{part}": tensor for part, tensor in parts.items()}).items()
    }
    scheme = compressed_scheme(4, 128, symmetric=False)
    ours = AwqFormat({"bits": 4, "group_size": 128}).read("layer", parts)
    read = CompressedTensorsFormat({"config_groups": {"group_0": scheme}}).read("layer", theirs)
    assert torch.equal(ours.codes, read.codes)
    assert torch.equal(ours.zero_point, read.zero_point)
    assert torch.equal(ours.scale, read.scale)


@pytest.mark.parametrize("rows", [48, 45])
def test_compressed_tensors_rows_that_fill_no_word(rows):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors packs these layers")
    weight = torch.randn(rows, 256)
    layer = quantize_groups(weight, 128, False, torch.float32)
    scheme = compressed_scheme(4, 128, symmetric=False)
    read = CompressedTensorsFormat({"config_groups": {"g": scheme}}).read("x", compressed_parts(layer, weight, scheme))
    assert torch.equal(read.codes.long() + 8, layer.codes)
    assert torch.equal(read.zero_point.long() + 8, layer.zero)


def test_compressed_tensors_scheme_of_a_layer():
    """Exact names before patterns before the class."""
    exact, pattern, other = (compressed_scheme(4, size) for size in (32, 64, 128))
    exact["targets"], pattern["targets"] = ["a.q_proj"], ["re:.*q_proj"]
    groups = {"group_0": other, "group_1": pattern, "group_2": exact}
    reader = CompressedTensorsFormat({"config_groups": groups, "format": "pack-quantized"})
    for name, size in {"a.q_proj": 32, "b.q_proj": 64, "b.k_proj": 128}.items():
        assert reader._of_layer(name)["weights"]["group_size"] == size


@pytest.mark.parametrize("group_size, k, ours, groups", [(512, 1024, 256, 4), (96, 480, 32, 15), (1024, 512, -1, 1)])
def test_groups_that_we_do_not_have_are_cut(group_size, k, ours, groups):
    layer = random_layer(k=k, group_size=group_size, zeros=False)
    tensor = converted(read_gptq(layer))
    assert tensor.group_size == ours and tensor.zero_point is None
    assert torch.equal(tensor.codes.long() + 8, layer.codes)
    assert tensor.group_scale.shape[1] >= groups
    assert_same_weight(tensor, layer)


def test_ragged_last_group():
    layer = random_layer(k=320, group_size=128)
    tensor = converted(read_gptq(layer))
    assert torch.equal(tensor.codes.long() + 8, layer.codes)
    assert_same_weight(tensor, layer)


@pytest.mark.parametrize("zeros", [True, False])
def test_negative_scales(zeros):
    """AutoRound writes them; a code of -8 has no mirror image, which a zero point carries."""
    layer = random_layer(scale=torch.randn(48, 4), zeros=zeros)
    tensor = converted(read_gptq(layer))
    assert int(tensor.group_scale.min()) >= 1
    mirrored = (layer.scale < 0).repeat_interleave(128, 1)
    wanted = torch.where(mirrored, 15 - layer.codes, layer.codes)
    assert torch.equal(tensor.codes.long() + 8, wanted)
    whole = layer.scale.abs() > 0.25  # in a small group beside a large one, 8 bits are coarse
    error = (layer.weight - tensor.dequantize(torch.float64)).abs().unflatten(1, (4, 128)).amax(-1)
    assert bool((error[whole] < 0.15 * layer.scale.abs().double()[whole]).all())


def test_scales_of_zero():
    scale = torch.rand(48, 4) + 0.3
    scale[::3, 1] = 0
    layer = random_layer(scale=scale)
    tensor = converted(read_gptq(layer))
    assert bool((tensor.dequantize()[::3, 128:256] == 0).all())
    assert_same_weight(tensor, layer)


@pytest.mark.parametrize(
    "options, bits", [({"scale_bits": 4}, 4), ({"amplifier": 1024}, None), ({"amplifier": "layer"}, None)]
)
def test_options(options, bits):
    layer = random_layer(scale=torch.rand(48, 4) * 0.02 + 0.01)
    tensor = converted(read_gptq(layer), **options)
    assert torch.equal(tensor.codes.long() + 8, layer.codes)
    if bits:
        assert tensor.scale_bits == bits and int(tensor.group_scale.max()) < 1 << bits
    else:
        one = tensor.row_scale.unique()
        assert one.numel() == 1 and math.log2(float(one)).is_integer()
    assert_same_weight(tensor, layer, 15)  # Listing 1 leaves 2 or 3 bits


def test_zero_points_of_a_symmetric_layer_are_dropped():
    tensor = converted(read_gptq(random_layer(zeros=False)))
    assert tensor.zero_point is None


@pytest.mark.parametrize("amplifier", ["row", 4096, "layer"])
def test_blocks_of_rows_change_nothing(amplifier, monkeypatch):
    """A large layer is converted some rows at a time: same parts and figures as at once."""
    layer = random_layer(n=200, scale=torch.rand(200, 4).pow(4) * 0.2 + 1e-3)
    read = read_gptq(layer)
    whole = IntScaleTensor.from_codes(
        read.codes, read.scale, group_size=128, zero_point=read.zero_point, amplifier=amplifier, dtype=torch.float32
    )
    monkeypatch.setattr("intscale_compile.importing.layers.BLOCK_ELEMENTS", 64 * 512)
    tensor, row = to_intscale(read, "layer", torch.float32, ScaleOptions(amplifier=amplifier))
    for name in whole.data_names:
        assert torch.equal(getattr(tensor, name), getattr(whole, name)), name
    assert tensor.scale_bits == whole.scale_bits and tensor.shape == whole.shape
    assert row.snr_db == pytest.approx(scale_rounding_snr(whole, read.scale))
    assert row.headroom_bits == pytest.approx(31 - math.log2(int(whole.accumulator_bound().max())))


# --- whole folders ----------------------------------------------------------------------------------------------------


def gptq_folder(model, folder, parts_of=None, **config):
    def parts(name, weight):
        layer = quantize_groups(weight, 128, True)
        return layer, gptq_parts(layer)

    return write_checkpoint(model, folder, "gptq", parts_of or parts, {"bits": 4, "group_size": 128, **config})


def test_settings_of_single_layers(tmp_path):
    """GPTQModel's ``dynamic``: another group size for one layer, another left alone."""

    def parts(name, weight):
        if name.endswith("v_proj"):
            return None
        layer = quantize_groups(weight, 32 if name.endswith("o_proj") else 128, True)
        return layer, gptq_parts(layer)

    gptq_folder(tiny_llama(), tmp_path, parts, dynamic={r"-:.*v_proj": {}, r"+:.*\.o_proj": {"group_size": 32}})
    model, report = from_quantized(tmp_path)
    assert model.model.layers[1].self_attn.o_proj.weight.group_size == 32
    assert {row.group_size for row in report.layers} == {32, 128}
    assert [name for name in report.unquantized if name != "lm_head"] == [
        f"model.layers.{i}.self_attn.v_proj" for i in range(2)
    ]


def test_autogptq_file_and_biases_of_zero(tmp_path):
    """AutoGPTQ kept its settings in a file of their own, and wrote biases of zeros for layers that have none."""

    def parts(name, weight):
        layer = quantize_groups(weight, 128, True)
        return layer, {**gptq_parts(layer), "bias": torch.zeros(weight.shape[0])}

    gptq_folder(tiny_llama(attention_bias=False), tmp_path, parts)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = config.pop("quantization_config")
    del stored["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(stored))
    model, report = from_quantized(str(tmp_path))
    assert len(report.layers) == 14
    assert model.model.layers[0].mlp.up_proj.bias is None


def test_dtype_generation_config_and_saving(tmp_path):
    plain = tiny_llama(tie_word_embeddings=True)
    gptq_folder(plain, tmp_path / "gptq")
    (tmp_path / "gptq" / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    model, _ = from_quantized(tmp_path / "gptq", dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.temperature == 0.25
    assert not hasattr(model.config, "quantization_config") and not model.training

    save_pretrained(model, tmp_path / "ours")
    ids = torch.randint(0, 96, (1, 12))
    again = type(model).from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_report(tmp_path):
    gptq_folder(tiny_llama(num_hidden_layers=1), tmp_path)
    _, report = from_quantized(tmp_path)
    text = str(report)
    assert text.splitlines()[0].startswith("layer ") and text.splitlines()[0].endswith("proof headroom, bits")
    assert len(text.splitlines()) == 1 + 7 + 2
    assert "1 linear layers in high precision: lm_head" in text
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["unquantized"] == ["lm_head"] and len(stored["layers"]) == 7
    row = stored["layers"][0]
    assert row["name"] == "model.layers.0.mlp.down_proj" and row["shape"] == [256, 384] and row["symmetric"]
    assert 50 < row["snr_db"] < 80 and 0 < row["headroom_bits"] < 31


def test_a_name_that_is_no_checkpoint():
    with pytest.raises(FileNotFoundError, match="no hub name"):
        from_quantized("/nowhere/at/all")
    with pytest.raises(ConfigError, match="no linear layer"):
        from_quantized(torch.nn.Linear(32, 32))


def test_hub_names_are_downloaded(tmp_path, monkeypatch):
    gptq_folder(tiny_llama(num_hidden_layers=1), tmp_path)
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    _, report = from_quantized("somebody/model-gptq", revision="v2")
    assert len(report.layers) == 7 and asked == [("somebody/model-gptq", "v2")]


def test_overflow_is_refused_by_name(tmp_path):
    """transformers reads in threads and logs errors; ours comes out as it is."""

    def parts(name, weight):
        layer = quantize_groups(weight * 100, 128, True)
        return layer, gptq_parts(layer)

    gptq_folder(tiny_llama(num_hidden_layers=1), tmp_path, parts)
    with pytest.raises(OverflowProofError, match=r"model.layers.0.*: amplifier=1048576"):
        from_quantized(tmp_path, amplifier=1 << 20)
