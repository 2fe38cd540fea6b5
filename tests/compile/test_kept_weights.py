"""What the backend keeps of a weight follows the weight, serves every graph and dies with it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.passes.kept import _kept
from tests.support.compiled import Block, compiled, rewritten, w4a8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_weight_updates_are_seen():
    module, x = nn.Linear(64, 48), torch.randn(4, 64)
    run = compiled(module)
    with torch.no_grad():
        run(x)
        module.weight.mul_(2.0)
        torch.testing.assert_close(run(x), w4a8(x, module.weight, module.bias))
        module.weight = nn.Parameter(torch.randn(48, 64))
        torch.testing.assert_close(run(x), w4a8(x, module.weight, module.bias))


def test_updates_of_a_quantized_weight_are_seen_also_when_merged():
    model = Block().eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    run, x = rewritten(model), torch.randn(4, 64)
    run(x)
    model.q.weight.copy_(IntScaleTensor.from_hp(torch.randn(64, 64)))
    changed = run(x)
    torch._dynamo.reset()
    assert torch.equal(changed, rewritten(model)(x))
    run(x)
    model.q.weight[:32].copy_(IntScaleTensor.from_hp(torch.randn(32, 64)))
    changed_again = run(x)
    _kept.clear()
    torch._dynamo.reset()
    assert torch.equal(changed_again, rewritten(model)(x)) and not torch.equal(changed, changed_again)


def test_layers_that_share_a_graph_keep_their_own_weights():
    """Regional compilation: Dynamo serves the second layer with the graph of the first; the bits of layers compiled apart."""
    layers = nn.ModuleList([Block(bias=False).eval().requires_grad_(False) for _ in range(3)])
    x = torch.randn(4, 64)
    expected = []
    for layer in layers:
        torch._dynamo.reset()
        expected.append(compiled(copy.deepcopy(layer))(x))
    torch._dynamo.reset()
    for layer in layers:
        layer.compile(backend="intscale")
    for layer, want in zip(layers, expected):
        assert torch.equal(layer(x), want)


def test_repeated_compilation_does_not_quantize_again(monkeypatch):
    calls = []
    original = IntScaleTensor.from_hp.__func__
    monkeypatch.setattr(
        IntScaleTensor, "from_hp", classmethod(lambda cls, *a, **k: calls.append(1) or original(cls, *a, **k))
    )
    model, x = Block().eval().requires_grad_(False), torch.randn(4, 64)
    rewritten(model)(x)
    first = len(calls)
    torch._dynamo.reset()
    rewritten(model)(x)
    intscale_compile.explain(model, x)
    assert (first, len(calls)) == (6, 6)


def test_kept_weights_die_with_their_parameters():
    model = Block().eval().requires_grad_(False)
    mine = {id(p) for p in model.parameters()}
    rewritten(model)(torch.randn(4, 64))

    def kept():
        return [key for key in _kept if mine & {id(r()) for r in _kept[key].sources}]

    assert len(kept()) == 7  # six weights, one merged bias; merged weights are the weights themselves
    del model
    torch._dynamo.reset()
    gc.collect()
    assert kept() == []
