"""Distilling: row scales and vectors of a quantized model follow the original's answers, codes do not."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from intscale_compile import CalibrationConfig, IntScaleConfig, calibrate
from intscale_compile.calibration import distill, distilling, generated_token_ids
from intscale_compile.calibration.distilling import _layers, _replaced
from intscale_compile.errors import CalibrationError
from tests.support.model_families import TEXT


@pytest.fixture
def quantized(model):
    other = copy.deepcopy(model)
    quantize_(other, IntScaleConfig(group_size=32))
    return other


def divergence(model, original, data) -> float:
    with torch.no_grad():
        found, wanted = (m(data).logits.flatten(0, 1).log_softmax(-1) for m in (model, original))
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def test_distilled_model_is_nearer_and_keeps_its_codes(model, quantized, data):
    before, state = divergence(quantized, model, data), {n: p.clone() for n, p in quantized.named_parameters()}
    report = distill(quantized, model, data, 20, progress=False)
    assert report.kept and report.before is None  # 512 tokens are one batch: nothing is held out
    assert report.last < 0.9 * report.first and divergence(quantized, model, data) < 0.9 * before
    assert [n for n, m in quantized.named_modules() if "forward" in vars(m)] == []
    for name, parameter in quantized.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None
        if hasattr(parameter, "qdata"):
            assert torch.equal(parameter.qdata, state[name].qdata) and torch.equal(parameter.scale, state[name].scale)
            assert not torch.equal(parameter.per_tensor_scale, state[name].per_tensor_scale)
        elif parameter.dim() > 1:
            assert torch.equal(parameter, state[name])


def test_equal_seeds_give_equal_bits(model, quantized, data):
    first, second = copy.deepcopy(quantized), quantized
    batches = [{"input_ids": ids} for ids in data.split(2)]
    losses = [distill(m, model, batches, 3, seed=1, progress=False).last for m in (first, second)]
    assert losses[0] == losses[1] and torch.equal(first(data).logits, second(data).logits)


@pytest.mark.parametrize("narrow", [False, True])
def test_layers_compute_what_quantized_layers_do(monkeypatch, narrow, data):
    """A rotation of the input, a static activation scale, an input order, a bias, and 8-bit weights."""
    monkeypatch.setattr(distilling, "has_amx", lambda: narrow)
    layers = nn.ModuleList(nn.Linear(64, 32, bias=bias) for bias in (True, False, True, False)).requires_grad_(False)
    quantize_(layers[:3], IntScaleConfig(group_size=32))
    quantize_(layers[3:], IntScaleConfig(weight_bits=8, group_size=-1))
    changes = [lambda w: w.with_rotation(32), lambda w: w.with_activation_scale(0.02)]
    changes += [lambda w: w.with_input_order(torch.randperm(64)), lambda w: w]
    x = torch.randn(2, 5, 64)
    for layer, change in zip(layers, changes):
        layer.weight = nn.Parameter(change(layer.weight), requires_grad=False)
        wanted = layer(x)
        with _replaced(_layers(layer)):
            torch.testing.assert_close(layer(x), wanted, rtol=1e-2 if narrow else 1e-5, atol=1e-2 if narrow else 1e-5)


def test_a_model_that_does_not_gain_is_left_alone(monkeypatch, model, quantized, data):
    monkeypatch.setattr(distilling, "HELD_OUT", 2)
    before = quantized(data).logits
    batches = [{"input_ids": ids} for ids in data.split(4)]
    report = distill(quantized, model, batches, 3, rate=0.5, progress=False)
    assert not report.kept and report.after > report.before and torch.equal(quantized(data).logits, before)


def test_refusals_leave_the_model(model, quantized, data):
    with pytest.raises(CalibrationError, match="no quantized linear layer"):
        distill(model, model, data)
    broken, before = copy.deepcopy(model), quantized(data).logits
    broken.model.embed_tokens.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        distill(quantized, broken, torch.zeros_like(data), 1, progress=False)
    assert torch.equal(quantized(data).logits, before)


def test_encoders_match_hidden_states_of_tokens_that_count():
    config = hf.BertConfig(num_hidden_layers=1, **TEXT)
    model = hf.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    other = copy.deepcopy(model)
    quantize_(other, IntScaleConfig(group_size=32))
    ids, mask = torch.randint(0, 128, (2, 4, 16)), torch.ones(4, 16, dtype=torch.long)
    mask[:, 9:] = 0
    batches = [{"input_ids": part, "attention_mask": mask} for part in ids]
    report = distill(other, model, batches, 10, progress=False)
    assert report.last < report.first
    changed = [{"input_ids": part.where(mask.bool(), 5), "attention_mask": mask} for part in ids]
    again = copy.deepcopy(model)
    quantize_(again, IntScaleConfig(group_size=32))
    assert distill(again, model, changed, 10, progress=False).last == pytest.approx(report.last, rel=1e-3)


def test_calibrate_distills_in_the_end(model, data):
    plain, chosen = copy.deepcopy(model), CalibrationConfig.from_preset("rtn", distillation_steps=2)
    report = calibrate(model, data, chosen, progress=False)
    assert report.distillation is not None and report.distillation.kept
    assert calibrate(plain, data, "rtn", progress=False).distillation is None
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (model, plain)]
    assert torch.equal(weights[0].qdata, weights[1].qdata) and not torch.equal(*(w.row_scale for w in weights))
    assert CalibrationConfig.from_dict(model.config.intscale_calibration_config).distillation_steps == 2


def test_generated_token_ids(model):
    state = torch.get_rng_state()
    ids = generated_token_ids(model, 5, 12, seed=3, batch_size=2)
    assert ids.shape == (5, 12) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ids, generated_token_ids(model, 5, 12, seed=3, batch_size=2))
    assert not torch.equal(ids, generated_token_ids(model, 5, 12, seed=4, batch_size=2))
    assert generated_token_ids(model, 2, 1).shape == (2, 1)
    with pytest.raises(CalibrationError, match="generate"):
        generated_token_ids(nn.Linear(2, 2))
