"""Sensitivity of single layers, and the layers that are moved to 8 bits."""

import json
import xml.etree.ElementTree

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
from torchao.quantization import FqnToConfig, quantize_  # noqa: E402

from intscale_compile import IntScaleConfig, IntScaleTensor  # noqa: E402
from intscale_compile.calibration.sensitivity import (  # noqa: E402
    LayerSensitivity,
    SensitivityReport,
    auto_overrides,
    measure_sensitivity,
    quantizable,
)
from intscale_compile.errors import CalibrationError  # noqa: E402
from tests.support.calibration import small_model  # noqa: E402


def test_each_layer_is_measured_alone_and_the_model_stays():
    model, inputs = small_model("llama")
    kept = {n: p for n, p in model.named_parameters()}
    report = measure_sensitivity(model, inputs["input_ids"])
    assert [layer.name for layer in report.layers] == list(quantizable(model))
    assert "lm_head" not in str(report)
    assert all(p is kept[n] for n, p in model.named_parameters())

    layer = report.layers[-1]
    assert layer.name == "model.layers.0.mlp.down_proj"
    module = model.model.layers[0].mlp.down_proj
    tensor = IntScaleTensor.from_hp(module.weight, IntScaleConfig())
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        before = model(**inputs).logits.log_softmax(-1)
    exact, rounded = module(seen[0]), F.linear(seen[0], tensor)
    snr = 10 * torch.log10(exact.square().sum() / (exact - rounded).square().sum())
    assert layer.snr_db == pytest.approx(float(snr), abs=1e-3)
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    with torch.no_grad():
        after = model(**inputs).logits.log_softmax(-1)
    divergence = float(F.kl_div(after, before, log_target=True, reduction="sum")) / inputs["input_ids"].numel()
    assert layer.divergence == pytest.approx(divergence, rel=1e-3)
    assert layer.nbytes == tensor.nbytes_packed()
    wide = IntScaleTensor.from_hp(kept["model.layers.0.mlp.down_proj.weight"], IntScaleConfig(weight_bits=8))
    assert layer.wide_nbytes == wide.nbytes_packed()


def test_experts_are_measured_and_routers_are_not():
    model, inputs = small_model("mixtral")
    names = ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]
    report = measure_sensitivity(model, inputs["input_ids"], names=names)
    assert [layer.name for layer in report.layers] == names
    assert all(5 < layer.snr_db < 40 and layer.divergence > 0 for layer in report.layers)
    assert not any(name.endswith("mlp.gate") for name in quantizable(model))


def test_eight_bits_are_less_sensitive_than_four():
    model, inputs = small_model("llama")
    names = ["model.layers.0.mlp.down_proj"]
    four = measure_sensitivity(model, inputs["input_ids"], names=names).layers[0]
    eight = measure_sensitivity(model, inputs["input_ids"], IntScaleConfig(weight_bits=8), names=names).layers[0]
    assert eight.snr_db > four.snr_db + 15
    assert eight.divergence < four.divergence / 10


def test_unknown_names_are_refused():
    model, inputs = small_model("llama")
    with pytest.raises(CalibrationError, match="no linear layer is named 'lm_head'"):
        measure_sensitivity(model, inputs["input_ids"], names=["lm_head"])


def made_report(*costs):
    """Layers of 100 bytes (200 in 8 bits), the last one ten times as large, with these divergences."""
    sizes = [100] * (len(costs) - 1) + [1000]
    layers = [LayerSensitivity(f"l.{i}.p{i}", 20.0, c, 9.0, s, 2 * s) for i, (c, s) in enumerate(zip(costs, sizes))]
    return SensitivityReport(tuple(layers), 8.0, IntScaleConfig())


def test_overrides_spend_the_budget_on_divergence_per_byte():
    report = made_report(0.1, 0.3, 0.2, 0.9)
    chosen = auto_overrides(None, None, 1.0 + 201 / 1300, report=report)
    assert list(chosen) == ["l.1.p1", "l.2.p2"]  # 0.9 for 1000 bytes is less per byte, and does not fit
    assert all(config == IntScaleConfig(weight_bits=8) for config in chosen.values())
    assert auto_overrides(None, None, 1.0, report=report) == {}
    assert len(auto_overrides(None, None, 2.0, report=report)) == 4


def test_impossible_budgets_are_refused():
    with pytest.raises(CalibrationError, match="memory_budget=0.9"):
        auto_overrides(None, None, 0.9, report=made_report(0.1, 0.2))
    report = SensitivityReport(made_report(0.1).layers, 8.0, IntScaleConfig(weight_bits=8))
    with pytest.raises(CalibrationError, match="8 bits already"):
        auto_overrides(None, None, report=report)


def test_chosen_layers_fit_the_budget_in_real_bytes():
    model, inputs = small_model("llama")
    overrides = auto_overrides(model, inputs["input_ids"], 1.2)
    assert overrides

    def nbytes(table):
        torch.manual_seed(0)
        quantized, _ = small_model("llama")
        config = {"lm_head": None, "_default": IntScaleConfig(), **table}
        quantize_(quantized, FqnToConfig(config), filter_fn=None)
        return sum(p.nbytes_packed() for p in quantized.parameters() if isinstance(p, IntScaleTensor))

    assert 1.0 < nbytes(overrides) / nbytes({}) <= 1.2


def test_the_report_prints_draws_and_becomes_json():
    report = made_report(0.1, 0.3, 0.2)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["l.1.p1", "l.2.p2", "l.0.p0"]
    assert "300.000" in lines[1] and "+12.50%" in lines[1] and "8.000" in lines[-1]
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["divergence"] == 0.3
    picture = xml.etree.ElementTree.fromstring(report.to_svg())
    bars = [e for e in picture.iter() if e.tag.endswith("rect")][1:]
    widths = [float(bar.get("width")) for bar in bars]
    assert widths[1] == max(widths) and widths[0] == pytest.approx(widths[1] / 3, abs=0.1)
    assert [e.text for e in picture.iter() if e.tag.endswith("text")][1] == "l.0.p0"
