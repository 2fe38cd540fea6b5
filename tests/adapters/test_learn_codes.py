"""Codes learned on a task: the scales stay to the bit, the loss falls or nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

hf = pytest.importorskip("transformers")

from intscale_compile import CalibrationConfig, IntScaleConfig, IntScaleTensor, learn_codes, quantize  # noqa: E402
from intscale_compile.calibration.block_clipping import rounded_within  # noqa: E402
from intscale_compile.errors import CalibrationError, ConfigError  # noqa: E402
from intscale_compile.learning import Mixed  # noqa: E402
from intscale_compile.learning.codes import _order  # noqa: E402
from intscale_compile.learning.factors import LearnedLayer  # noqa: E402
from tests.support.calibration import calibrated, logits_of, same_weights, tiny_llama  # noqa: E402
from tests.support.tensors import make  # noqa: E402

IDS = torch.arange(16 * 24).mul(7).remainder(128).view(16, 24)
QUICK = {"steps": 10, "lr": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(2)


@pytest.fixture(scope="module")
def batches(original) -> list:
    """The task: to say what the original says."""
    with torch.no_grad():
        labels = original(IDS).logits.argmax(-1)
    shifted = torch.cat([IDS[:, :1], labels[:, :-1]], 1)  # the model compares with the next label
    return [{"input_ids": i, "labels": label} for i, label in zip(IDS.split(1), shifted.split(1))]


def parts(model: nn.Module, *names: str) -> dict:
    found = {n: p for n, p in model.named_parameters() if isinstance(p, IntScaleTensor)}
    return {n: [getattr(p, part) for part in names] for n, p in found.items()}


RECIPES = {
    "default": IntScaleConfig(),
    "w8a8": IntScaleConfig(weight_bits=8),
    "gptq": CalibrationConfig("g", clipping="none"),
    "rotated": CalibrationConfig("r", rounding="nearest", clipping="none", rotation="hadamard"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_codes_change_and_the_loss_falls(recipe, original, batches):
    config = RECIPES[recipe]
    model = copy.deepcopy(original)
    model = quantize(model, config) if isinstance(config, IntScaleConfig) else calibrated(model, IDS, config)
    before = copy.deepcopy(model)
    report = learn_codes(model, original, batches, **QUICK)
    names = ("scale", "per_tensor_scale", "block_size", "rotation", "packing_format")
    for name, values in parts(model, *names).items():
        for now, then in zip(values, parts(before, *names)[name]):
            assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
    assert report.losses[0] > report.losses[report.kept] and report.kept > 0
    assert sum(report.changed.values()) > 0 and report.weights == sum(p.numel() for p in parts_of(model))
    assert all(p.validate() is p for p in parts_of(model))
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    held_out = [batches[7], batches[15]]
    with torch.no_grad():  # what was measured while learning is what the model does
        loss = sum(float(model(**batch).loss) for batch in held_out) / 2
        start = sum(float(before(**batch).loss) for batch in held_out) / 2
    assert loss == pytest.approx(report.losses[report.kept], rel=1e-3)
    assert start == pytest.approx(report.losses[0], rel=1e-3)


def parts_of(model: nn.Module) -> list:
    return [p for p in model.parameters() if isinstance(p, IntScaleTensor)]


def test_nothing_better_leaves_the_model_as_it_was(original, batches):
    model = quantize(copy.deepcopy(original), IntScaleConfig())
    before = copy.deepcopy(model)
    report = learn_codes(model, original, batches, **{**QUICK, "lr": 5.0, "steps": 2})
    assert report.kept == 0 and set(report.changed.values()) == {0} and same_weights(model, before)
    again = [quantize(copy.deepcopy(original), IntScaleConfig()) for _ in range(2)]
    for one in again:
        learn_codes(one, original, batches, first_layer=1, seed=3, **{**QUICK, "steps": 3})
    assert same_weights(*again)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again[0].get_parameter(name).qdata, before.get_parameter(name).qdata)


@pytest.mark.parametrize(
    "kind", ["plain", "zero points", "offsets", "order", "rotation", "transposed", "channel", "w8"]
)
def test_at_the_start_a_layer_computes_what_it_did(kind):
    tensor = make(64, 320, **({"group_size": -1} if kind == "channel" else {"weight_bits": 8} if kind == "w8" else {}))
    if kind == "zero points":
        tensor = tensor.replaced(zero_point=torch.randint(-4, 4, tensor.scale.shape, dtype=torch.int8))
    if kind == "offsets":
        tensor = tensor.replaced(zero_point=torch.randint(-20, 20, tensor.scale.shape, dtype=torch.int16))
    tensor = tensor.with_input_order(torch.randperm(320)) if kind == "order" else tensor
    tensor = tensor.with_rotation(64) if kind == "rotation" else tensor
    dense = tensor.dequantize()
    if kind == "transposed":
        tensor, dense = tensor.transpose(-2, -1), dense.mT
    module = nn.Linear(320, 64)
    module.weight = nn.Parameter(tensor, requires_grad=False)
    layer = LearnedLayer("layer", module, dense + 0.05 * dense.std() * torch.randn_like(dense))
    assert torch.equal(layer.codes(layer.factors.detach()).to(torch.int8), layer.plain.codes)
    x = torch.randn(3, 320, requires_grad=True)
    y = layer.forward(x)
    wanted = nn.functional.linear(x.detach(), tensor.transpose(-2, -1) if kind == "transposed" else tensor, module.bias)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    product = 2 * y.detach() @ (dense.mT if kind == "transposed" else tensor.dequantize())
    torch.testing.assert_close(x.grad, product, rtol=1e-3, atol=1e-3)
    assert layer.finish(layer.factors.detach()) == 0 and module.weight is not None


def test_the_gradient_is_that_of_rounding_straight_through():
    module = nn.Linear(256, 32)
    module.weight = nn.Parameter(make(32, 256), requires_grad=False)
    layer = LearnedLayer("layer", module, module.weight.dequantize() + 0.01 * torch.randn(32, 256))
    factors = (1 + 0.05 * torch.randn_like(layer.factors)).requires_grad_(True)
    scaled = layer.weight / (layer.steps * factors.repeat_interleave(128, -1))
    inside = rounded_within(scaled, -8, 7)
    gradient = torch.randn(32, 256)
    (inside * layer.steps * gradient).sum().backward()
    torch.testing.assert_close(layer.slope(gradient, factors.detach()), factors.grad, rtol=1e-4, atol=1e-5)


def test_the_share_of_multimodal_batches_falls():
    order = _order(Mixed(["m"] * 5, ["t"] * 5, 1.0, 0.0), 1000, 0.1, 0)
    shares = [order[i : i + 100].count("m") for i in range(0, 1000, 100)]
    assert shares[0] == 100 and shares[1] > 85 and 35 < shares[5] < 65 and shares[9] < 15
    assert sorted(_order([1, 2, 3], 6, 0.0, 0)) == [1, 1, 2, 2, 3, 3]


def test_a_loss_of_ones_own_mixed_batches_and_other_parameters(original, batches):
    model = quantize(copy.deepcopy(original), IntScaleConfig())
    norm = model.model.norm.weight.clone()
    seen = []

    def loss(m, batch):
        seen.append(batch["input_ids"].shape)
        return m(**batch).loss

    report = learn_codes(model, original, Mixed(batches[:8], batches[8:]), loss=loss, also=["model.norm"], **QUICK)
    assert seen and report.kept > 0 and not torch.equal(model.model.norm.weight, norm)
    assert not model.model.norm.weight.requires_grad


BAD = {
    "not_quantized": (
        lambda o: (copy.deepcopy(o), o),
        {},
        ConfigError,
        "no weight of the model from layer 0 on is quantized",
    ),
    "other_model": (lambda o: (_quantized(o), _another(2)), {}, ConfigError, "original is another model"),
    "fewer_layers": (
        lambda o: (_quantized(o), _first_layer(o)),
        {},
        ConfigError,
        "original has no layer model.layers.1",
    ),
    "training": (lambda o: (_quantized(o).train(), o), {}, ConfigError, "call model.eval"),
    "steps": (lambda o: (_quantized(o), o), {"steps": 0}, ConfigError, "steps=0 is not supported"),
    "also_lr": (lambda o: (_quantized(o), o), {"also_lr": -1.0}, ConfigError, "also_lr=-1.0 is not supported"),
    "also": (
        lambda o: (_quantized(o), o),
        {"also": ["projector"]},
        ConfigError,
        "no plain parameter is called 'projector'",
    ),
    "layers": (lambda o: (_quantized(o), o), {"first_layer": 2}, ConfigError, "from layer 2 on is quantized"),
}


def _another(layers: int) -> nn.Module:
    torch.manual_seed(5)
    return tiny_llama(layers)


def _first_layer(original: nn.Module) -> nn.Module:
    model = copy.deepcopy(original)
    del model.model.layers[1]
    return model


def _quantized(original: nn.Module) -> nn.Module:
    return quantize(copy.deepcopy(original), IntScaleConfig(scale_search="absmax"))


@pytest.mark.parametrize("kind", BAD)
def test_refused(kind, original, batches):
    build, options, error, said = BAD[kind]
    model, source = build(original)
    before = copy.deepcopy(model)
    with pytest.raises(error, match=said):
        learn_codes(model, source, batches, **{**QUICK, **options})
    assert same_weights(model, before)


def test_failures_on_the_way_put_everything_back(original, batches):
    model = _quantized(original)
    before = copy.deepcopy(model)
    without = [{"input_ids": batch["input_ids"]} for batch in batches]
    with pytest.raises(CalibrationError, match="give them labels, or pass loss="):
        learn_codes(model, original, without, **QUICK)
    calls = []

    def breaks(m, batch):
        calls.append(1)
        return m(**batch).loss * (float("nan") if len(calls) > 5 else 1)

    with pytest.raises(CalibrationError, match="the loss is nan at step 2: use a smaller lr"):
        learn_codes(model, original, batches, loss=breaks, also=["model.norm"], **QUICK)
    with pytest.raises(CalibrationError, match="two are needed at least"):
        learn_codes(model, original, batches[:1], **QUICK)
    shared = _quantized(original)
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ConfigError, match="is shared by several layers"):
        learn_codes(shared, original, batches, **QUICK)
    assert same_weights(model, before) and not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(logits_of(model, {"input_ids": IDS}), logits_of(before, {"input_ids": IDS}))
