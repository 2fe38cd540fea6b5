"""Products with quantized weights in every spelling, and gradients straight through the quantizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from intscale_compile.errors import InputError, UnsupportedOpError
from intscale_compile.kernels.quantize_per_token import quantize_per_token_aten
from tests.support.tensors import PACKINGS, make, module

# --- products -------------------------------------------------------------------------------------------------------


def expected(x, weight, bias=None):
    """What W4A8 means: quantized activations times the dequantized weight, in fp64."""
    xq, token_scale = quantize_per_token_aten(x)
    y = (xq.double() * token_scale.double()) @ weight.dequantize(torch.float32).double().t()
    return y if bias is None else y + bias.double()


def assert_close(found, wanted, dtype=torch.float32):
    assert found.dtype == dtype and found.shape == wanted.shape
    unit = torch.finfo(dtype).eps
    assert (found.double() - wanted).abs().max() <= 4 * unit * wanted.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(packing, dtype):
    weight, bias, x = make(70, 300, packing=packing), torch.randn(70), torch.randn(5, 300).to(dtype)
    assert_close(F.linear(x, weight, bias), expected(x, weight, bias), dtype)
    assert_close(F.linear(x, weight), expected(x, weight), dtype)


def test_every_spelling_of_a_product_is_the_same():
    weight, bias, x = make(70, 300), torch.randn(70), torch.randn(5, 300)
    y = F.linear(x, weight)
    spellings = [
        x @ weight.t(),
        x @ weight.T,
        x @ weight.mT,
        torch.matmul(x, weight.t()),
        torch.mm(x, weight.t()),
        x.mm(weight.t()),
        x.matmul(weight.transpose(0, 1)),
        torch.matmul(x, other=weight.t()),
        x.mm(mat2=weight.t()),
        F.linear(x, weight, None),
        F.linear(input=x, weight=weight),
        torch.ops.aten.mm.default(x, weight.t()),
        torch.ops.aten.linear.default(x, weight),
        torch.inner(x, weight),
        torch.tensordot(x, weight, dims=([-1], [1])),
        torch.tensordot(x, weight.t(), dims=1),
        torch.einsum("bk,nk->bn", x, weight),
        torch.einsum("...k,kn->...n", [x, weight.t()]),
        torch.einsum("nk,bk", weight, x),
        torch.linalg.matmul(x, weight.t()),
    ]
    for i, other in enumerate(spellings):
        assert torch.equal(other, y), i
    z = F.linear(x, weight, bias)
    for other in (
        torch.addmm(bias, x, weight.t()),
        bias.addmm(x, weight.t()),
        torch.addmm(input=bias, mat1=x, mat2=weight.t()),
        F.linear(x, weight, bias=bias),
        torch.ops.aten.addmm.default(bias, x, weight.t()),
    ):
        assert torch.equal(other, z)
    assert torch.equal(torch.addmm(torch.ones(5, 70), x, weight.t()), y + 1)


def test_shapes_of_activations():
    weight, bias = make(70, 300), torch.randn(70)
    x = torch.randn(2, 3, 4, 300)
    y = F.linear(x, weight, bias)
    assert y.shape == (2, 3, 4, 70)
    assert torch.equal(y.reshape(-1, 70), F.linear(x.reshape(-1, 300), weight, bias))
    assert torch.equal(F.linear(x[1, 2, 3], weight, bias), y[1, 2, 3])
    assert torch.equal(x[0, 0, 0] @ weight.t(), F.linear(x[0, 0, 0], weight))
    assert F.linear(x[:0], weight, bias).shape == (0, 3, 4, 70)
    assert F.linear(torch.zeros(0, 300), weight).shape == (0, 70)
    strided = torch.randn(300, 6).t()
    assert torch.equal(F.linear(strided, weight), F.linear(strided.contiguous(), weight))
    assert torch.equal(F.linear(x[:, 1:2].expand(2, 5, 4, 300), weight)[:, 3], F.linear(x[:, 1], weight))


@pytest.mark.parametrize(
    "make_input, message",
    [
        (lambda: torch.zeros(2, 299), "299 features, the weight 300"),
        (lambda: torch.zeros(2, 384), "384 features, the weight 300"),  # as wide as the padded rows, still wrong
        (lambda: torch.zeros(2, 300, dtype=torch.int64), "int64.*cast it first"),
        (lambda: torch.zeros(2, 300, dtype=torch.float64), "float64.*cast it first"),
        (lambda: torch.zeros(2, 300, device="meta"), "on meta, the weight on cpu"),
        (lambda: torch.tensor(1.0), "scalar"),
    ],
)
def test_bad_activations(make_input, message):
    for product in (lambda x, w: F.linear(x, w), lambda x, w: x @ w.t()):
        with pytest.raises(InputError, match=message):
            product(make_input(), make(70, 300))


@pytest.mark.parametrize("shape", [(1,), (69,), (70, 1), (5, 70)])
def test_bias_of_another_shape_is_refused(shape):
    """A bias of one entry would broadcast in PyTorch and be read past its end by a GPU kernel."""
    with pytest.raises(InputError, match="bias"):
        F.linear(torch.zeros(5, 300), make(70, 300), torch.zeros(shape))


def test_stack_and_transposed_weights_are_refused_by_linear():
    with pytest.raises(UnsupportedOpError, match="select one expert"):
        F.linear(torch.zeros(2, 256), make(3, 64, 256))
    with pytest.raises(UnsupportedOpError, match="2-D \\[N, K\\]"):
        F.linear(torch.zeros(2, 64), make(64, 256).t())


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_gradient_is_straight_through(packing):
    """grad_x = grad @ dequantized weight to the bit; the bias gets the sum; the weight gets nothing."""
    weight = make(70, 300, packing=packing)
    x, bias = torch.randn(2, 5, 300, requires_grad=True), torch.randn(70, requires_grad=True)
    grad = torch.randn(2, 5, 70)
    F.linear(x, weight, bias).backward(grad)
    assert torch.equal(x.grad, grad @ weight.dequantize())
    assert torch.allclose(bias.grad, grad.sum((0, 1)), rtol=1e-6)
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_in_half_precision(dtype):
    weight = make(64, 256, dtype=dtype)
    x = torch.randn(3, 256, dtype=dtype, requires_grad=True)
    y = F.linear(x, weight)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad.dtype == dtype and torch.equal(x.grad, grad @ weight.dequantize())


def test_gradient_through_a_small_model_and_only_where_asked():
    first, second, x = module(), make(8, 64), torch.randn(4, 256, requires_grad=True)
    F.linear(torch.relu(first(x)), second).sum().backward()
    hidden = first(x.detach())
    wanted = (torch.ones(4, 8) @ second.dequantize() * (hidden > 0)) @ first.weight.dequantize()
    assert torch.allclose(x.grad, wanted, rtol=1e-5, atol=1e-5)
    assert first.bias.grad is not None
    with torch.no_grad():
        assert not F.linear(x, first.weight).requires_grad
    assert not F.linear(x.detach(), first.weight).requires_grad
    only_bias = F.linear(x.detach(), first.weight, first.bias)
    only_bias.sum().backward()
    assert only_bias.requires_grad
