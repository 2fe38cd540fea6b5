"""Merging adapters into quantized weights: nothing changes where the adapter is zero, and the format never does."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
hf = pytest.importorskip("transformers")

from intscale_compile import IntScaleConfig, IntScaleTensor, lora, quantize, save_pretrained  # noqa: E402
from intscale_compile.calibration import PRESETS  # noqa: E402
from intscale_compile.errors import ConfigError, WeightError  # noqa: E402
from intscale_compile.lora.merging import lost_effect  # noqa: E402
from intscale_compile.lora.requantize import requantized  # noqa: E402
from tests.support.adapters import adapted, change  # noqa: E402
from tests.support.calibration import calibrated, logits_of, same_weights, tiny_llama  # noqa: E402
from tests.support.tensors import make  # noqa: E402

DATA = torch.arange(128).mul(7).remainder(128).view(2, 64)


@pytest.fixture(scope="module")
def models():
    """One layer under ``quantize`` and under every preset, made when it is asked for."""
    torch.manual_seed(0)
    plain, made = tiny_llama(1), {}

    def get(name: str) -> nn.Module:
        if name not in made:
            if name == "quantize":
                made[name] = quantize(copy.deepcopy(plain), IntScaleConfig(scale_search="absmax"))
            else:
                made[name] = calibrated(plain, DATA, name)
        return copy.deepcopy(made[name])

    return get


def formats(model):
    names = ("rotation", "weight_bits", "group_size", "data_names")
    found = {n: p for n, p in model.named_parameters() if isinstance(p, IntScaleTensor)}
    return {name: [getattr(p, part) for part in names] for name, p in found.items()}


# Groups, W8A8 with rotated inputs, static scales, weights per channel, and the model rotated: the others' forms are among these.
QUICK = ("quantize", "best", "encoder", "fptq", "llama3", "odyssey")


@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in ("quantize", *PRESETS)]
)
def test_a_zero_adapter_changes_no_bit(models, preset, tmp_path):
    base = models(preset)
    before = logits_of(base, {"input_ids": DATA})
    merged = adapted(copy.deepcopy(base)).merge_and_unload()
    assert same_weights(merged, base) and torch.equal(logits_of(merged, {"input_ids": DATA}), before)
    assert same_weights(lora.merge(adapted(copy.deepcopy(base)), DATA, progress=False), base)

    save_pretrained(base, tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    merged = adapted(loaded).merge_and_unload()
    assert same_weights(merged, base) and torch.equal(logits_of(merged, {"input_ids": DATA}), before)


@pytest.mark.parametrize("preset", ["quantize", "llama3", "fptq"])
def test_a_merged_model_keeps_formats_and_comes_close_to_the_unmerged(models, preset, caplog):
    base = models(preset)
    peft_model = change(adapted(copy.deepcopy(base)))
    inputs = {"input_ids": DATA}
    unmerged = logits_of(peft_model, inputs)
    moved = (unmerged - logits_of(base, inputs)).norm()
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        merged = lora.merge(copy.deepcopy(peft_model))
    (said,) = [r.getMessage() for r in caplog.records if "merged" in r.getMessage()]
    assert said.startswith("merged an adapter into 7 quantized weights: rounding lost") and "with data=" in said
    with_data = lora.merge(copy.deepcopy(peft_model), DATA, progress=False)
    assert formats(merged) == formats(with_data) == formats(base)
    for model in (merged, with_data):
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(p.validate() is p for p in model.parameters() if isinstance(p, IntScaleTensor))
    lost = (logits_of(with_data, inputs) - unmerged).norm()
    assert lost < 0.75 * moved and lost < 0.75 * (logits_of(merged, inputs) - unmerged).norm()
    of_peft = copy.deepcopy(peft_model).merge_and_unload()
    assert same_weights(of_peft, merged)


def test_unmerge_gives_back_the_weight_itself(models):
    peft_model = change(adapted(models("quantize")))
    before = logits_of(peft_model, {"input_ids": DATA})
    weights = {n: p for n, p in peft_model.named_parameters() if isinstance(p, IntScaleTensor)}
    names = list(peft_model.state_dict())
    peft_model.merge_adapter()
    assert list(peft_model.state_dict()) == names
    assert not torch.equal(logits_of(peft_model, {"input_ids": DATA}), before)
    peft_model.unmerge_adapter()
    assert all(p is weights[n] for n, p in peft_model.named_parameters() if n in weights)
    assert torch.equal(logits_of(peft_model, {"input_ids": DATA}), before)


@pytest.mark.parametrize(
    "fields",
    [{}, {"group_size": 32}, {"weight_bits": 8}, {"scale_bits": 8}, {"amplifier": 1024}, {"packing": "tiled"}],
    ids=str,
)
def test_every_format_keeps_its_form(fields):
    tensor = make(64, 320, **fields)
    assert requantized(tensor, tensor.dequantize(), "w") is tensor
    down, up = torch.randn(4, 320), 0.02 * torch.randn(64, 4)
    wanted = tensor.dequantize() + up @ down
    merged = requantized(tensor, wanted, "w", down).validate()
    for name in ("scale_bits", "packing_format", "block_size", "data_names", "dtype", "rotation"):
        assert getattr(merged, name) == getattr(tensor, name)
    assert lost_effect(wanted, merged.dequantize(), tensor.dequantize(), down) < 0.1
    nearest = requantized(tensor, wanted, "w").dequantize()
    assert (nearest - wanted).norm() <= (tensor.dequantize() - wanted).norm()
    quantized_anew = IntScaleTensor.from_hp(wanted, IntScaleConfig(tensor.group_size, tensor.weight_bits)).dequantize()
    if not fields:
        assert (nearest - wanted).norm() <= 1.001 * (quantized_anew - wanted).norm()


def test_zero_points_orders_rotations_and_stacks_stay():
    plain = make(64, 256)
    order = torch.randperm(256)
    zero_point = torch.randint(-4, 4, plain.scale.shape, dtype=torch.int8)
    offset = torch.randint(-20, 20, plain.scale.shape, dtype=torch.int16)
    kinds = {
        "zero points": plain.replaced(zero_point=zero_point),
        "offsets": plain.replaced(zero_point=offset),
        "order": plain.with_input_order(order),
        "rotation": plain.with_rotation(64),
        "transposed": plain.transpose(-2, -1),
        "stack": make(3, 64, 256),
    }
    for kind, tensor in kinds.items():
        dense = tensor.dequantize()
        assert requantized(tensor, dense, "w") is tensor, kind
        merged = requantized(tensor, dense + 0.001 * torch.randn_like(dense), "w")
        assert merged.data_names == tensor.data_names and merged.shape == tensor.shape, kind
        close = (merged.dequantize() - dense).norm() / dense.norm()
        assert close < 0.05, (kind, close)


def test_bad_adapters_are_refused_before_anything_changes(models):
    base = models("quantize")
    with pytest.raises(ConfigError, match="has no adapters: pass what peft.get_peft_model"):
        lora.merge(base)
    with pytest.raises(ConfigError, match="pass data as well"):
        lora.merge(adapted(copy.deepcopy(base)), recipe="gptq")
    damaged = adapted(copy.deepcopy(base))
    with torch.no_grad():
        damaged.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(WeightError, match=r"model.layers.0.mlp.down_proj.weight: the changed weight has NaN"):
        lora.merge(damaged)
    assert all(torch.equal(p, base.get_parameter(n.replace("base_model.model.", "").replace(".base_layer", "")))
               for n, p in damaged.named_parameters() if isinstance(p, IntScaleTensor))  # fmt: skip
    two = adapted(copy.deepcopy(base))
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"takes the adapter layers away, and \['other'\] with them"):
        lora.merge(two)
    with pytest.raises(ConfigError, match="adapter='third' is not there: use one of"):
        lora.merge(two, adapter="third")
    with pytest.raises(ConfigError, match="its base weights are not quantized"):
        lora.merge(adapted(tiny_llama(1)))
