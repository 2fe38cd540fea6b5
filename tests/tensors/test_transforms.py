"""torch.func on quantized models: functional_call, grad, vjp, jvp, jacobians and vmap, against torch.autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, explain
from intscale_compile.errors import CompileError, UnsupportedOpError
from intscale_compile.tensors.experts import grouped_linear
from tests.support.compiled import rewritten
from tests.support.tensors import make

ROWS = 6


@pytest.fixture
def model():
    made = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).eval().requires_grad_(False)
    quantize_(made, IntScaleConfig(group_size=32))
    made[2].weight = nn.Parameter(made[2].weight.with_rotation(16), requires_grad=False)
    return made


@pytest.fixture
def x():
    return torch.randn(ROWS, 64)


def by_autograd(model, x):
    watched = x.clone().requires_grad_()
    model(watched).sum().backward()
    return watched.grad


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_functional_call_and_vmap_are_exact(model, x):
    skeleton = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).requires_grad_(False)
    assert torch.equal(functional_call(skeleton, dict(model.named_parameters()), (x,)), model(x))
    assert torch.equal(vmap(model)(x), model(x))


def test_gradients(model, x):
    expected = by_autograd(model, x)
    total = lambda v: model(v).sum()  # noqa: E731
    close(grad(total)(x), expected)
    close(vmap(grad(total))(x), expected)
    close(grad(lambda v: vmap(model)(v).sum())(x), expected)
    close(vjp(model, x)[1](torch.ones(ROWS, 32))[0], expected)


def test_jacobians(model, x):
    row = x[0]
    reverse = jacrev(model)(row)
    close(reverse.sum(0), by_autograd(model, row[None])[0])
    close(jacfwd(model)(row), reverse)
    close(jvp(model, (row,), (torch.ones(64),))[1], reverse.sum(1))


def test_tangents_without_torch_func(model, x):
    """torch.library's gradients lose them, and nothing is said."""
    change = torch.randn_like(x)
    wanted = jvp(model, (x,), (change,))[1]
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(model(forward_ad.make_dual(x, change)))
        # From torch 2.15 on Dynamo refuses them itself.
        refused = "cannot carry tangents .* call the model itself|wrap a dual tensor input"
        with pytest.raises((CompileError, torch._dynamo.exc.Unsupported), match=refused):
            rewritten(model)(forward_ad.make_dual(x, change))
    assert torch.equal(y.tangent, wanted) and torch.equal(y.primal, model(x))
    close(linearize(model, x)[1](change), wanted)


def test_gradients_of_what_is_not_quantized(model, x):
    biases = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    found = grad(lambda p: functional_call(model, p, (x,)).sum())(biases)
    close(found["2.bias"], torch.full((32,), float(ROWS)))
    model[0].bias.requires_grad_()
    model(x).sum().backward()
    close(found["0.bias"], model[0].bias.grad)


def test_what_is_not_differentiated_is_refused(model, x):
    with pytest.raises(UnsupportedOpError, match="quantized weights out of what torch.func differentiates"):
        grad(lambda p: functional_call(model, p, (x,)).sum())(dict(model.named_parameters()))
    stack, offsets = make(2, 64, 64), torch.tensor([3, 6], dtype=torch.int32)
    with pytest.raises(UnsupportedOpError, match="not defined through experts; use torch.autograd.grad"):
        grad(lambda v: grouped_linear(v, stack, offsets).sum())(x)


def test_compiled(model, x):
    """A graph that differentiates is not rewritten, which explain says; its weights run quantized all the same."""
    expected = by_autograd(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: vmap(grad(lambda u: model(u).sum()))(v), backend="intscale")
    close(compiled(x), expected)


def test_explain_names_the_reason():
    class Score(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 32)

        def forward(self, x):
            return grad(lambda v: self.layer(v).sum())(x)

    report = explain(Score().requires_grad_(False), torch.randn(2, 64))
    assert [layer.reason for layer in report.fallbacks] == ["DIFFERENTIATED"]
