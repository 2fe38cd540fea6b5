"""The Hadamard kernels on a GPU: the bits of the reference, and one launch before the GEMM of a compiled layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1, 14336, 2048), (300, 14336, 2048), (7, 28672, 4096), (16, 4096, 4096), (5, 96, 32), (3, 32768, 32768)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activation(rows: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, features)
    x[:, 3::101] *= 30.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, features, size", SHAPES)
def test_kernels_have_the_bits_of_the_reference(rows, features, size, dtype):
    from intscale_compile.kernels.hadamard import HADAMARD_OP, HADAMARD_QUANTIZE_OP
    from intscale_compile.kernels.quantize_static import STATIC_OP

    x = activation(rows, features, dtype)
    assert torch.equal(HADAMARD_OP(x.cuda(), size).cpu(), HADAMARD_OP(x, size))
    for scale in (None, torch.full((1, 1), 0.03), torch.rand(rows, 1) + 0.01):
        found = HADAMARD_QUANTIZE_OP(x.cuda(), size, None if scale is None else scale.cuda())
        assert all(torch.equal(f.cpu(), r) for f, r in zip(found, HADAMARD_QUANTIZE_OP(x, size, scale)))
        if scale is not None:
            found = STATIC_OP(x.cuda(), scale.cuda())
            assert all(torch.equal(f.cpu(), r) for f, r in zip(found, STATIC_OP(x, scale)))


def test_rows_too_long_for_one_program():
    """Two launches, the same bits; a block that is too large runs as the reference."""
    from intscale_compile.kernels.hadamard import HADAMARD_OP, HADAMARD_QUANTIZE_OP

    x = activation(3, 65536, torch.bfloat16)
    for size in (4096, 65536):
        assert torch.equal(HADAMARD_OP(x.cuda(), size).cpu(), HADAMARD_OP(x, size))
        found = HADAMARD_QUANTIZE_OP(x.cuda(), size, None)
        assert all(torch.equal(f.cpu(), r) for f, r in zip(found, HADAMARD_QUANTIZE_OP(x, size, None)))


def test_rows_that_are_not_finite_stay_alone():
    from intscale_compile.kernels.hadamard import HADAMARD_QUANTIZE_OP

    x = activation(6, 14336, torch.bfloat16).cuda()
    for scale in (None, torch.full((1, 1), 0.03, device="cuda")):
        clean = HADAMARD_QUANTIZE_OP(x, 2048, scale)
        bad = x.clone()
        bad[1, 5], bad[4, -1] = float("nan"), float("inf")
        xq, token_scale = HADAMARD_QUANTIZE_OP(bad, 2048, scale)
        others = [0, 2, 3, 5]
        assert token_scale[[1, 4]].isnan().all()
        assert torch.equal(xq[others], clean[0][others]) and torch.equal(token_scale[others], clean[1][others])


def layer(rotation: int, static: float | None) -> nn.Linear:
    from tests.support.static import prepared

    linear = nn.Linear(14336, 1024, bias=False)
    linear.weight = nn.Parameter(prepared(linear.weight.detach(), rotation, static), requires_grad=False)
    return linear.cuda()


@pytest.mark.parametrize("rotation, static", [(2048, None), (2048, 0.03), (0, 0.03)])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_compiled_is_eager_with_one_launch_before_the_gemm(rotation, static, tokens):
    model, x = layer(rotation, static), activation(tokens, 14336, torch.bfloat16).cuda()
    torch._dynamo.reset()
    run = torch.compile(model, backend="intscale")
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            found = run(x)
        torch.cuda.synchronize()
        assert torch.equal(found, expected)
        assert torch.equal(found.cpu(), model.cpu()(x.cpu()))
        model.cuda()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(x)
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    before = [
        name for name in kernels if "hadamard_quantize" in name or "triton_tem" not in name and "w4a8" not in name
    ]
    assert len(before) == 1 and ("hadamard_quantize_kernel" in before[0]) == bool(rotation), kernels


@pytest.mark.parametrize("tokens", [1, 64])
def test_cuda_graphs(tokens):
    model, x = layer(2048, None).bfloat16(), activation(tokens, 14336, torch.bfloat16).cuda()
    torch._dynamo.reset()
    run = torch.compile(model, backend="intscale", mode="reduce-overhead")
    with torch.no_grad():
        expected = model(x)
        for _ in range(4):
            found = run(x).clone()
    assert torch.equal(found, expected)


def test_gradients():
    model, x = layer(2048, 0.03), activation(5, 14336, torch.float32).cuda().requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(model, backend="intscale")(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ model.weight.dequantize(torch.float32), rtol=1e-3, atol=1e-3)
