"""``compare`` finds injected faults by name, and nothing where there are none."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, compare
from intscale_compile.debug.sqnr import group_noise, predicted, rescaled, sqnr
from intscale_compile.errors import InputError

transformers = pytest.importorskip("transformers")


class Net(nn.Module):
    """A norm, and layers with sums between them."""

    def __init__(self, width=256, depth=4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.requires_grad_(False)

    def forward(self, x):
        x = self.norm(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def quantized(model, **fields):
    copied = copy.deepcopy(model)
    quantize_(copied, IntScaleConfig(**fields))
    return copied


@pytest.fixture(scope="module")
def tiny_llama(models_dir):
    path = models_dir / "tiny-llama"
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, num_hidden_layers=4).eval()


@pytest.fixture(scope="module")
def llama_inputs():
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, 1000, (1, 24), generator=generator), "use_cache": False}


@pytest.mark.parametrize(
    "fields",
    [{}, {"group_size": 32}, {"group_size": -1}, {"weight_bits": 8}, {"amplifier": 1024, "scale_bits": 8}],
    ids=str,
)
def test_nothing_is_found_where_nothing_is_wrong(fields):
    model = Net()
    result = compare(model, quantized(model, **fields), torch.randn(8, 256))
    assert result.first is None and "no layer deviates" in str(result)
    linears = [layer for layer in result.layers if layer.kind == "Linear"]
    assert len(linears) == 4
    for layer in linears:  # rounding explains what is measured
        assert abs(layer.local - layer.expected) < 3
    assert linears[-1].sqnr < linears[-1].local  # the errors of the layers before it come on top


@pytest.mark.parametrize("layer", [0, 2])
def test_one_corrupted_group_scale_is_found(layer):
    model = Net()
    other = quantized(model)
    scale = other.layers[layer][0].weight.scale
    scale[17, 1] = 1 if scale[17, 1] > 4 else 15
    result = compare(model, other, torch.randn(8, 256))
    assert result.first.name == f"layers.{layer}.0"
    assert "error of group 1 row 17 is" in result.first.note and result.first.note in str(result)
    assert sum(one.deviates for one in result.layers) == 1
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["first"] == f"layers.{layer}.0" and found["layers"][0]["sqnr"] == "inf"


def test_a_corrupted_scale_in_a_language_model_is_found_by_one_call(tiny_llama, llama_inputs):
    other = quantized(tiny_llama, scale_search="absmax")
    assert compare(tiny_llama, other, llama_inputs).first is None
    weight = other.model.layers[1].mlp.up_proj.weight
    weight.scale[7, 1] = 1
    result = compare(torch.compile(tiny_llama), torch.compile(other, backend="intscale"), llama_inputs)
    assert result.first.name == "model.layers.1.mlp.up_proj"
    weight.per_tensor_scale[5] *= -1
    assert compare(tiny_llama, other, llama_inputs, bound=10).first is None  # one row of 1024 is not much
    weight.per_tensor_scale *= 3
    result = compare(tiny_llama, other, llama_inputs, bound=10)
    assert result.first.name == "model.layers.1.mlp.up_proj"
    assert "nothing makes up for it: model.layers.1.mlp is at" in result.first.note


@pytest.mark.parametrize("fault", ["row scale", "codes", "activation scale", "norm", "nan"])
def test_other_faults_are_found(fault):
    model = Net()
    other = quantized(model)
    weight, name = other.layers[1][0].weight, "layers.1.0"
    if fault == "row scale":
        weight.per_tensor_scale[3] *= 1.7
    elif fault == "codes":
        weight.qdata.copy_(weight.qdata.roll(1, 1))
    elif fault == "activation scale":
        weight.act_pre_scale = torch.full((1, 1), 1e-3)
    elif fault == "norm":
        other.norm.bias.add_(0.5)
        name = "norm"
    else:
        weight.per_tensor_scale[0] = math.nan
    result = compare(model, other, torch.randn(8, 256))
    assert result.first.name == name
    if fault == "nan":
        assert "NaN dB alone" in result.first.note and result.to_dict()["output_sqnr"] == "-inf"


def test_smoothing_is_no_fault():
    """A scale of channels that moves from a norm into the weights behind it."""
    model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 128), nn.Linear(128, 64)).requires_grad_(False)
    smoothed = copy.deepcopy(model)
    factors = torch.rand(256) * 4 + 0.25
    smoothed[0].weight /= factors
    smoothed[0].bias /= factors
    smoothed[1].weight *= factors
    between = torch.rand(128) * 4 + 0.25  # from one layer into the next: AWQ does that
    smoothed[1].weight /= between[:, None]
    smoothed[1].bias /= between
    smoothed[2].weight *= between
    quantize_(smoothed, IntScaleConfig())
    result = compare(model, smoothed, torch.randn(16, 256))
    assert result.first is None, str(result)
    assert "output channels rescaled" in result.layers[0].note and "input channels rescaled" in result.layers[1].note
    smoothed[1].weight.scale[9, 0] = 1 if smoothed[1].weight.scale[9, 0] > 4 else 15
    assert compare(model, smoothed, torch.randn(16, 256)).first.name == "1"


def test_rotated_weights_and_conv1d_are_compared_in_their_form():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(128, 256), nn.Linear(128, 64)).requires_grad_(False)
    other = copy.deepcopy(model)
    quantize_(other, IntScaleConfig(), filter_fn=intscale_compile.linears_and_experts)
    result = compare(model, other, torch.randn(8, 256))
    assert result.first is None and result.layers[0].expected < 30
    other[0].weight.scale[9, 1] = 1 if other[0].weight.scale[9, 1] > 4 else 15
    assert "group 1 row 9" in compare(model, other, torch.randn(8, 256)).first.note


def test_repeated_calls_and_different_modules_are_named():
    class Twice(nn.Module):
        def __init__(self, extra):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.extra = nn.Linear(64, 64) if extra else None

        def forward(self, x):
            return self.a(self.a(x)) + (0 if self.extra is None else self.extra(x))

    torch.manual_seed(1)
    one, two = Twice(False), Twice(True)
    two.load_state_dict(one.state_dict(), strict=False)
    result = compare(one, two, torch.randn(4, 64))
    assert [layer.name for layer in result.layers] == ["a", "a[1]"] and result.unmatched == ("extra",)
    assert result.layers[0].sqnr == math.inf


def test_modes_and_hooks_are_put_back():
    model = Net().train()
    other = quantized(model).eval()
    compare(model, other, (torch.randn(2, 256),))
    assert model.training and model.layers[0].training and not other.training
    assert not any(module._forward_hooks for module in [*model.modules(), *other.modules()])


def test_misuse_is_an_error():
    model = Net()
    with pytest.raises(InputError, match="one object: keep a copy"):
        compare(model, torch.compile(model), torch.randn(2, 256))
    with pytest.raises(InputError, match="no module with the same name"):
        compare(model, nn.Sequential(nn.Linear(256, 256)), torch.randn(2, 256))


def test_sqnr_and_prediction():
    a = torch.tensor([3.0, 4.0])
    assert sqnr(a, a) == math.inf and sqnr(a, a * torch.nan) == -math.inf
    assert sqnr(a, torch.tensor([3.0, 4.5])) == pytest.approx(20)
    assert sqnr((a, torch.tensor([-math.inf])), (a, torch.tensor([-math.inf]))) == math.inf  # a mask
    with pytest.raises(InputError, match="shapes"):
        sqnr(a, a[:1])
    weight = torch.randn(64, 256)
    packed = intscale_compile.IntScaleTensor.from_hp(weight, IntScaleConfig(group_size=64, scale_search="absmax"))
    x = torch.randn(500, 256)
    error = (packed.dequantize() - weight).unflatten(-1, (4, 64)).square().mean(-1)
    assert (error / group_noise(weight, packed)).mean() == pytest.approx(1, abs=0.15)
    y = x @ weight.T
    assert predicted(weight, packed, x, y) == pytest.approx(sqnr(y, nn.functional.linear(x, packed)), abs=0.7)
    assert rescaled(x, x * 3) is not None and rescaled(x, x + 0.01 * torch.randn_like(x)) is None


def test_noise_floor():
    """In fp32 the last bits stay the last bits; with int8 activations they do not. Nothing stays on the model."""
    model, x = Net(), torch.randn(2048, 256)  # so many values that some are next to a rounding boundary
    served = quantized(model)
    floors = [compare(model, other, x).noise_floor for other in (copy.deepcopy(model), served)]
    assert floors[0] > 120 and 20 < floors[1] < floors[0] - 10
    assert f"(noise floor {floors[1]:.1f} dB)" in str(compare(model, served, x))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in served.modules())
