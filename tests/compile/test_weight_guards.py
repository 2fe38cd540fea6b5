"""What Dynamo asks of quantized weights at each call, and that a change of a weight is still noticed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import CompileError
from intscale_compile.versions import version_of
from tests.support.moe import sqnr

FORMATS = {
    "per channel": IntScaleConfig(group_size=-1),
    "8 bits": IntScaleConfig(weight_bits=8, scale_bits=8),
    "8-bit scales": IntScaleConfig(scale_bits=8),
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 256, bias=False), nn.Linear(256, 128, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def make_stack(layers: int = 2) -> Stack:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Stack(layers).eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    return model


@pytest.fixture
def compilations(monkeypatch):
    """Graphs compiled so far, as a list that grows."""
    from intscale_compile import backend

    seen, bind = [], backend.bind
    monkeypatch.setattr(
        backend, "bind", lambda rewrite, compile_graph: (seen.append(rewrite), bind(rewrite, compile_graph))[1]
    )
    return seen


def test_questions_of_one_call(monkeypatch):
    """The first weight is asked for its names and for its attributes; others at most for their attributes."""
    model = make_stack()
    compiled, x = torch.compile(model, backend="intscale"), torch.randn(3, 128)
    for _ in range(3):
        compiled(x)
    asked, flatten = [], IntScaleTensor.__tensor_flatten__
    monkeypatch.setattr(IntScaleTensor, "__tensor_flatten__", lambda self: (asked.append(self), flatten(self))[1])
    compiled(x)
    first = sum(weight is model.layers[0].up.weight for weight in asked)
    assert first == 2
    assert len(asked) - first == (0 if version_of("torch") < (2, 13) else 2 * 2 - 1)


@pytest.mark.parametrize("name", [n if n == "8 bits" else pytest.param(n, marks=pytest.mark.slow) for n in FORMATS])
def test_exchanged_weight_of_another_format(name, compilations):
    """The parameter of a layer behind the first gets other attributes, or other dtypes inside: the graph is compiled again."""
    model = make_stack()
    compiled, x = torch.compile(model, backend="intscale"), torch.randn(3, 128)
    compiled(x)
    torch.manual_seed(1)
    dense = torch.randn(256, 128) / 11
    model.layers[1].up.weight = nn.Parameter(IntScaleTensor.from_hp(dense, FORMATS[name]), requires_grad=False)
    assert len(compilations) == 1
    assert sqnr(model(x), compiled(x)) > 50
    assert len(compilations) == 2
    model.layers[1].up.weight = nn.Parameter(IntScaleTensor.from_hp(-dense, FORMATS[name]), requires_grad=False)
    assert sqnr(model(x), compiled(x)) > 50
    assert len(compilations) == 2  # same format: same graph


def test_model_converted_in_place(compilations):
    """``Module.to`` exchanges what is inside the parameters: the dictionaries that hold them, and token ids, stay as they are."""
    model = nn.Sequential(nn.Embedding(16, 128), make_stack()).bfloat16().requires_grad_(False)
    compiled, ids = torch.compile(model, backend="intscale"), torch.arange(12).view(3, 4)
    for _ in range(3):
        assert compiled(ids).dtype == torch.bfloat16
    model.to(torch.float16)
    assert len(compilations) == 1
    y = compiled(ids)
    assert y.dtype == torch.float16
    assert sqnr(model(ids), y) > 40
    assert len(compilations) == 2


def test_layers_of_two_formats_share_code(compilations):
    """Regional compilation: one graph for each format, and none for a layer more."""
    model = make_stack(layers=3)
    for layer in model.layers[1::2]:
        layer.up.weight = nn.Parameter(
            IntScaleTensor.from_hp(torch.randn(256, 128), FORMATS["8 bits"]), requires_grad=False
        )
    x = torch.randn(3, 128)
    expected = model(x)
    for layer in model.layers:
        layer.compile(backend="intscale")
    assert sqnr(expected, model(x)) > 50
    assert len(compilations) == 2


def test_inner_tensor_of_another_layout_is_refused():
    model = make_stack()
    compiled, x = torch.compile(model, backend="intscale"), torch.randn(3, 128)
    compiled(x)
    weight = model.layers[1].up.weight
    weight.qdata = weight.qdata.T.contiguous().T
    with pytest.raises(CompileError, match=r"layers\.1\.up\.weight: qdata has changed .* torch\._dynamo\.reset\(\)"):
        compiled(x)
    torch._dynamo.reset()
    assert sqnr(model(x), compiled(x)) > 50
