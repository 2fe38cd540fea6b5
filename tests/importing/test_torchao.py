"""Models that torchao quantized: real tensors where they can be made on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

from intscale_compile import IntScaleTensor, convert_from_torchao, from_quantized
from intscale_compile.errors import ConfigError
from tests.support.quantized_checkpoints import quantize_groups, snr_db, tiny_llama


def linear_filter(module, name):
    return isinstance(module, nn.Linear) and "lm_head" not in name


CONFIGS = {
    "symmetric, group 64": (IntxWeightOnlyConfig(torch.int4, PerGroup(64)), 64, True),
    "asymmetric, group 128": (
        IntxWeightOnlyConfig(torch.int4, PerGroup(128), mapping_type=MappingType.ASYMMETRIC),
        128,
        False,
    ),
    "per channel": (IntxWeightOnlyConfig(torch.int4, PerAxis(0)), -1, True),
    "int8 activations": (
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
        32,
        True,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_intx_tensors(case):
    config, group_size, symmetric = CONFIGS[case]
    model = tiny_llama()
    quantize_(model, config, filter_fn=linear_filter)
    before = {name: m.weight for name, m in model.named_modules() if linear_filter(m, name)}
    dense = copy.deepcopy(model)
    for name, weight in before.items():
        dense.get_submodule(name).weight = nn.Parameter(weight.dequantize())
    report = convert_from_torchao(model)
    assert [row.name for row in report.layers] == list(before) and report.unquantized == ["lm_head"]
    for name, weight in before.items():
        found = model.get_submodule(name).weight
        assert isinstance(found, IntScaleTensor) and found.group_size == group_size
        assert torch.equal(found.codes, weight.qdata)
        assert (found.zero_point is None) == symmetric
        assert snr_db(weight.dequantize(), found.dequantize()) > 50
    ids = torch.randint(0, 96, (2, 16))
    assert snr_db(dense(ids).logits, model(ids).logits) > 25


def int4_tensor(layer, zero_point=None) -> Int4Tensor:
    """torchao's plain layout, made by hand: its own quantizer needs a GPU library."""
    codes = layer.codes - 8
    packed = ((codes[:, ::2] & 15) | ((codes[:, 1::2] & 15) << 4)).to(torch.uint8).view(torch.int8)
    scale = layer.scale.t().contiguous()
    if zero_point is None:
        zero_point = ((8 - layer.zero).t() * scale.float()).to(scale.dtype)  # W = scale * q + zero_point
    n, k = layer.codes.shape
    return Int4Tensor(packed, scale, zero_point.contiguous(), [1, layer.group_size], torch.Size([n, k]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_tensors(symmetric):
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32))
    layer = quantize_groups(model[0].weight.detach(), 128, symmetric, torch.bfloat16)
    model[0].weight = nn.Parameter(int4_tensor(layer), requires_grad=False)
    same, report = from_quantized(model)
    assert same is model and report.unquantized == ["2"]
    weight = model[0].weight
    assert torch.equal(weight.codes.long() + 8, layer.codes)
    assert weight.dtype == torch.bfloat16 and (weight.zero_point is None) == symmetric
    if not symmetric:
        assert torch.equal(weight.group_zero_point.long() + 8, layer.zero)
    assert snr_db(layer.weight, weight.dequantize(torch.float64)) > 50


def test_int4_zero_points_between_integers_are_refused():
    model = nn.Sequential(nn.Linear(256, 64))
    layer = quantize_groups(model[0].weight.detach(), 128, True, torch.bfloat16)
    between = 0.4 * layer.scale.t()
    model[0].weight = nn.Parameter(int4_tensor(layer, between), requires_grad=False)
    with pytest.raises(ConfigError, match=r"0: its zero points are fractions of a code \(up to 0.4"):
        convert_from_torchao(model)


def test_other_tensors_are_refused_and_nothing_changes():
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256))
    quantize_(model[0], IntxWeightOnlyConfig(torch.int4, PerGroup(64)))
    quantize_(model[1], Int8WeightOnlyConfig())
    before = [module.weight for module in model]
    with pytest.raises(ConfigError, match=r"1: torchao's Int8Tensor cannot be imported: Int4Tensor, IntxUnpacked"):
        convert_from_torchao(model)
    assert all(weight is module.weight for weight, module in zip(before, model))


def test_three_bits_and_prescaled_activations_are_refused():
    model = nn.Sequential(nn.Linear(256, 64))
    plain = copy.deepcopy(model)
    quantize_(model, IntxWeightOnlyConfig(torch.int3, PerGroup(64)))
    with pytest.raises(ConfigError, match="torch.int3 cannot be imported"):
        convert_from_torchao(model)
    tensor = int4_tensor(quantize_groups(plain[0].weight.detach(), 128, True, torch.bfloat16))
    tensor.act_pre_scale = torch.ones(256)
    plain[0].weight = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(ConfigError, match="act_pre_scale"):
        convert_from_torchao(plain)


def test_folder_of_torchao(tmp_path):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    plain = tiny_llama(torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(64)), modules_to_not_convert=["lm_head"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "ao")
    model, report = from_quantized(tmp_path / "ao")
    assert len(report.layers) == 14 and not hasattr(model.config, "quantization_config")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert torch.equal(module.weight.codes, theirs.get_submodule(name).weight.qdata)
