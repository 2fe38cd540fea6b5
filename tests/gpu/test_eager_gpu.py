"""Eager layers on a real GPU: prepared launches give the bits of the ordinary ones, whatever is done to weight and stream."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.kernels import prepared
from intscale_compile.kernels.from_activation import grouped_from_activation, linear_from_activation
from intscale_compile.tensors import eager, experts
from intscale_compile.tensors.linear import linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
F = torch.nn.functional
FORMS = {
    "4 bits": {}, "groups of 64": dict(group_size=64), "8-bit scales": dict(scale_bits=8), "per channel": dict(group_size=-1),
    "8-bit codes": dict(weight_bits=8, group_size=-1), "plain": dict(packing_format="plain"),
}  # fmt: skip
TOKENS = (1, 2, 16, 17, 64, 100, 256, 1024)


def make(n=1024, k=2048, seed=0, **config) -> IntScaleTensor:
    torch.manual_seed(seed)
    return IntScaleTensor.from_hp(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), IntScaleConfig(**config))


def ordinary(x, w, bias=None):
    """The launches through Triton, one after the other."""
    form = eager.WeightForm(w)
    return linear_from_activation(x.contiguous(), *form.parts, bias, *form.numbers, x.dtype)


def is_prepared(x, w, bias=None) -> bool:
    """Whether the last call of this form ran as a prepared sequence."""
    key = (x.shape, x.dtype, x.dtype, None if bias is None else bias.dtype)
    return isinstance(eager.form_of(w).kept.get(key), prepared.LaunchSequence)


@pytest.mark.parametrize("name", FORMS)
def test_the_bits_of_the_ordinary_path(name):
    plain = make(**FORMS[name])
    for w in (plain, plain.with_activation_scale(0.03), plain.with_rotation(64)):
        for tokens, dtype in itertools.product(TOKENS, (torch.bfloat16, torch.float32)):
            x = torch.randn(tokens, 2048, device="cuda", dtype=dtype)
            for bias in (None, torch.randn(1024, device="cuda", dtype=dtype)):
                expected = ordinary(x, w, bias)
                for _ in range(2):
                    assert torch.equal(linear(x, w, bias), expected), (tokens, dtype)
                assert is_prepared(x, w, bias), (tokens, dtype)


def test_shapes_and_gaps():
    w = make()
    for shape in ((2048,), (0, 2048), (3, 5, 2048), (1, 1, 2048)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        y = linear(x, w, None)
        assert y.shape == (*shape[:-1], 1024) and torch.equal(y, ordinary(x, w))
    wide = torch.randn(20, 4100, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, 4:2052], wide[:, 1:2049], wide[::2, :2048]):
        assert torch.equal(linear(x, w, None), ordinary(x, w))


def test_a_weight_that_is_rewritten_or_exchanged_is_noticed():
    w, x = make(), torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    before = linear(x, w, None)
    w.copy_(make(seed=1))
    after = linear(x, w, None)
    assert torch.equal(after, ordinary(x, w)) and not torch.equal(after, before)
    other = make(seed=2)
    for name in ("qdata", "scale", "per_tensor_scale"):
        setattr(w, name, getattr(other, name).clone())
    assert torch.equal(linear(x, w, None), ordinary(x, other))
    third = make(seed=3)
    for name in ("qdata", "scale", "per_tensor_scale"):
        getattr(w, name).data = getattr(third, name).clone()
    assert torch.equal(linear(x, w, None), ordinary(x, third))
    torch.utils.swap_tensors(w, fourth := make(seed=4))
    assert torch.equal(linear(x, w, None), ordinary(x, w)) and torch.equal(linear(x, fourth, None), ordinary(x, third))


def test_two_streams_and_four_threads():
    """Split-K counters and workspaces are not shared by what runs at the same time."""
    w = make(1024, 8192)
    inputs = [torch.randn(tokens, 8192, device="cuda", dtype=torch.bfloat16) for tokens in (16, 64, 128, 300)]
    expected = [ordinary(x, w) for x in inputs]
    failures = []

    def work(number):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(60):
                j = (number + i) % len(inputs)
                if not torch.equal(linear(inputs[j], w, None), expected[j]):
                    failures.append((number, i))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures


@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_a_cuda_graph_captures_it(tokens):
    w, x = make(1024, 8192), torch.zeros(tokens, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        linear(x, w, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, w, None)
        z = linear(y[:, :1024].repeat(1, 8), w, None)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, ordinary(x, w)) and torch.equal(z, ordinary(y.repeat(1, 8), w))


def test_gradients_modes_and_autocast_take_the_ordinary_path():
    from torch.utils.flop_counter import FlopCounterMode

    w = make()
    x = torch.randn(4, 2048, device="cuda", requires_grad=True)
    F.linear(x, w).sum().backward()
    assert torch.isfinite(x.grad).all()
    with FlopCounterMode(display=False), torch.no_grad():
        y = F.linear(x, w)
    assert torch.equal(y, ordinary(x.detach(), w))
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        z = F.linear(x, w)
    assert z.dtype == torch.bfloat16 and torch.equal(z, y.to(torch.bfloat16))


def test_modules_and_the_reference():
    """Against plain PyTorch, not against kernels of ours."""
    from intscale_compile.kernels.quantize_per_token import quantize_per_token_aten
    from intscale_compile.kernels.w4a8_linear import apply_scales, reference_accumulate

    module = torch.nn.Linear(2048, 1024, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    quantize_(module, IntScaleConfig())
    w = module.weight
    for tokens in TOKENS:
        x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
        xq, token_scale = quantize_per_token_aten(x)
        acc = reference_accumulate(xq, w.qdata, w.scale, 1024, w.group_size, w.packing_format)
        assert torch.equal(module(x), apply_scales(acc, token_scale, w.per_tensor_scale, None, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts(dtype):
    w = make_stack()
    x = torch.randn(24, 2048, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([3, 3, 20, 24], device="cuda", dtype=dtype)
    order = torch.randperm(24, device="cuda").to(dtype)
    form = (w.qdata, w.scale, w.per_tensor_scale, w.zero_point)
    numbers = (w.rotation, w.out_features, w.group_size, w.scale_bits, w.packing_format, x.dtype)
    for gather, scatter in ((None, None), (order, None), (order, order), (None, order)):
        expected = grouped_from_activation(x, *form, None, None, offsets, gather, scatter, *numbers)
        for _ in range(2):
            assert torch.equal(experts.grouped_linear(x, w, offsets, None, gather, scatter), expected)


def make_stack():
    torch.manual_seed(0)
    return IntScaleTensor.from_hp(torch.randn(4, 512, 2048, device="cuda", dtype=torch.bfloat16), IntScaleConfig())


@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
def test_ops_of_compiled_graphs(tokens):
    """The ops that Inductor calls are prepared one by one: with overlap, a residual, a gate."""
    from intscale_compile import ops
    from intscale_compile.kernels.launching import GPU_IMPLEMENTATIONS

    w = make()
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    xq, token_scale = torch.ops.intscale.quantize_per_token(x)
    weight = (xq, token_scale, w.qdata, w.scale, w.per_tensor_scale, None)
    numbers = (w.out_features, w.group_size, w.scale_bits, w.packing_format, x.dtype, ops.KERNEL_ABI)
    residual = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    cases = {
        "w4a8_linear": (*weight, *numbers, None, True),
        "w4a8_linear_add": (*weight, residual, *numbers, True),
        "w4a8_gated_linear": (*weight, "silu", *numbers, True),
    }
    for name, arguments in cases.items():
        expected = GPU_IMPLEMENTATIONS[f"intscale::{name}"](*arguments)
        for _ in range(2):
            assert torch.equal(getattr(torch.ops.intscale, name)(*arguments), expected), name


@pytest.mark.two_gpus
def test_a_device_that_is_not_the_current_one():
    w = make().to("cuda:1")
    x = torch.randn(64, 2048, device="cuda:1", dtype=torch.bfloat16)
    with torch.cuda.device(0):
        y = linear(x, w, None)
    with torch.cuda.device(1):
        assert torch.equal(y, ordinary(x, w))
