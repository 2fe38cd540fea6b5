"""Rotated inputs: any model keeps its function, and int8 activations with outlier channels lose less."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from intscale_compile import CalibrationConfig, IntScaleConfig, calibrate
from intscale_compile.calibration import rotated_inputs
from intscale_compile.calibration.groups import difference
from intscale_compile.calibration.layers import blocks
from intscale_compile.errors import CalibrationError
from tests.support.calibration import small_model, tiny_llama
from tests.support.model_families import TEXT

W8A8 = {"weight_bits": 8, "group_size": -1}


def encoder() -> nn.Module:
    torch.manual_seed(0)
    config = hf.BertConfig(num_hidden_layers=2, **TEXT)
    return hf.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[:, 11:] = 0
    return {"input_ids": torch.arange(64).view(4, 16), "attention_mask": mask}


def test_an_encoder_computes_what_it_did():
    model, inputs = encoder(), batch()
    before, kept = model(**inputs).last_hidden_state, model.encoder.layer[0].output.dense.weight.clone()
    sizes = rotated_inputs.rotate_inputs(model, inputs, set())
    linear = {n for n, m in model.encoder.named_modules() if isinstance(m, nn.Linear)}
    assert {f"encoder.{n}" for n in linear} == set(sizes)
    assert sizes["encoder.layer.1.output.dense"] == TEXT["intermediate_size"] & -TEXT["intermediate_size"]
    assert difference(model(**inputs).last_hidden_state, before) < 1e-5
    assert not torch.allclose(model.encoder.layer[0].output.dense.weight, kept)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_models_too(name):
    """GPT-2 keeps weights transposed; stacks of experts stay as they are, and their routers."""
    model, inputs = small_model(name)
    before = model(**inputs).logits
    sizes = rotated_inputs.rotate_inputs(model, inputs, set())
    assert sizes and not any("experts" in layer or layer.endswith("gate") for layer in sizes)
    assert difference(model(**inputs).logits, before) < 1e-4


def test_calibrated_encoder_with_outlier_channels():
    """Eight bits, channels of the feed-forward sums made to stand out: rotated inputs lose far less."""
    model, inputs = encoder(), batch()
    for _, block in blocks(model):
        block.intermediate.dense.weight[:3] *= 40
        block.output.dense.weight[:, :3] *= 0.1
    wanted, errors = model(**inputs).last_hidden_state, {}
    for rotation in ("none", "inputs"):
        other = copy.deepcopy(model)
        config = CalibrationConfig("mine", IntScaleConfig(**W8A8), rotation=rotation)
        report = calibrate(other, [inputs], config, progress=False)
        errors[rotation] = difference(other(**inputs).last_hidden_state, wanted)
        weights = [m.weight for m in other.encoder.modules() if isinstance(m, nn.Linear)]
        assert all(bool(w.rotation) == (rotation == "inputs") for w in weights)
        assert not any(m._forward_pre_hooks for m in other.modules())
    assert errors["inputs"] < 0.5 * errors["none"]
    assert any("rotated when the model runs" in change for change in report.changes)


def test_what_is_left_alone_is_not_rotated():
    model = tiny_llama()
    first = model.model.layers[0].mlp.up_proj
    kept = first.weight.clone()
    sizes = rotated_inputs.rotate_inputs(model, {"input_ids": torch.arange(8).view(1, 8)}, {(id(first), "weight")})
    assert "model.layers.0.mlp.up_proj" not in sizes and "model.layers.0.mlp.gate_proj" in sizes
    assert torch.equal(first.weight, kept) and not first._forward_pre_hooks


class ReadsItself(nn.Module):
    """A block that multiplies with the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(32, 32)

    def forward(self, hidden_states):
        return nn.functional.linear(hidden_states, self.dense.weight)


def test_a_weight_that_is_read_by_itself_is_refused():
    model = nn.Sequential()
    model.layers = nn.ModuleList([ReadsItself()])
    model.forward = lambda hidden_states: model.layers[0](hidden_states)
    with torch.no_grad(), pytest.raises(CalibrationError, match="without calling its layer"):
        rotated_inputs.rotate_inputs(model, {"hidden_states": torch.randn(2, 32)}, set())
