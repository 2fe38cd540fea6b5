"""What ``calibrate`` refuses: data, models and values, each by name; rotation only where it is possible."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
import transformers.integrations.moe  # noqa: F401 (defines an op)
from torch import nn

from intscale_compile import CalibrationConfig, IntScaleTensor, calibrate
from intscale_compile.calibration.capture import batches_of
from intscale_compile.errors import CalibrationError, WeightError
from tests.support.calibration import SHORT, calibrated, same_weights


@pytest.mark.parametrize("empty", [[], torch.zeros(0, 64, dtype=torch.long), torch.zeros(4, 0, dtype=torch.long)])
def test_no_data(model, empty):
    with pytest.raises(CalibrationError, match="no calibration data|token ids"):
        calibrate(model, empty, progress=False)


def test_wrong_data(model):
    with pytest.raises(CalibrationError, match="integer token ids"):
        batches_of([torch.zeros(2, 3)])
    with pytest.raises(CalibrationError, match="sequences, tokens"):
        batches_of(torch.zeros(2, 3, 4, dtype=torch.long))
    with pytest.raises(CalibrationError, match=r"data\[0\]\['inputs_embeds'\] has NaN"):
        calibrate(model, [{"inputs_embeds": torch.full((1, 4, 64), float("nan"))}], progress=False)


def test_not_finite_inside(model, data):
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight[5, 3] = float("inf")
    with pytest.raises(CalibrationError, match="before the first block are not finite"):
        calibrate(broken, torch.full((1, 8), 5), "gptq", progress=False)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises((WeightError, CalibrationError), match="layers.1"):
        calibrate(model, data, "rtn", progress=False)


def test_wrong_models(model, data):
    with pytest.raises(CalibrationError, match="transformers model"):
        calibrate("llama", data, progress=False)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no nn.ModuleList"):
        calibrate(nn.Sequential(nn.Linear(32, 32)).eval(), data, progress=False)
    with pytest.raises(CalibrationError, match="training mode"):
        calibrate(copy.deepcopy(model).train(), data, progress=False)
    calibrate(model, data, CalibrationConfig(**SHORT), progress=False)
    with pytest.raises(CalibrationError, match="quantized already"):
        calibrate(model, data, CalibrationConfig(**SHORT), progress=False)


def test_a_rotation_where_possible(model, data, caplog):
    """The model that can be rotated is; an encoder is calibrated without, and the log says why."""
    chosen = CalibrationConfig(rotation="auto", **SHORT)
    assert same_weights(
        calibrated(model, data, chosen), calibrated(model, data, CalibrationConfig(rotation="hadamard", **SHORT))
    )
    shape = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    encoder = hf.BertModel(hf.BertConfig(**shape)).eval().requires_grad_(False)
    with caplog.at_level("WARNING", "intscale_compile"):
        found = calibrated(encoder, data, chosen)
    assert "calibrated without a rotation" in caplog.text
    assert same_weights(found, calibrated(encoder, data, CalibrationConfig(**SHORT)))
    with pytest.raises(CalibrationError):
        calibrated(encoder, data, CalibrationConfig(rotation="hadamard", **SHORT))


@pytest.mark.parametrize(
    "pair", [("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"), ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj")]
)
def test_a_shared_weight_is_refused_before_anything_changes(model, data, pair):
    """Two layers would calibrate two different weights, and the tie be lost."""
    first, second = (model.model.get_submodule(name) for name in pair)
    second.weight = first.weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=rf"model.{pair[1]}.weight is one parameter with 1 other.*clone"):
        calibrate(model, data, "llama3", progress=False)
    assert second.weight is first.weight
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    second.weight = nn.Parameter(second.weight.clone(), requires_grad=False)  # the mend
    calibrate(model, data[:2], CalibrationConfig(**SHORT), progress=False)
    assert isinstance(first.weight, IntScaleTensor) and isinstance(second.weight, IntScaleTensor)
