"""The backend end to end on small models: both doors, forms of a product, options, staleness, autograd, caches."""

import copy
import logging

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import ConfigError
from intscale_compile.passes import PASSES
from tests.support.compiled import Block, compiled, rewritten, w4a8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sqnr(reference, value):
    return (10 * torch.log10(reference.square().mean() / (reference - value).square().mean())).item()


def test_backend_is_found_by_name():
    assert "intscale" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    "dtype, run",
    [pytest.param(torch.float32, compiled, marks=pytest.mark.vectorized), (torch.bfloat16, rewritten)],
    ids=["fp32", "bf16 without Inductor"],
)
def test_both_doors_are_bit_identical_and_near_the_original(dtype, run):
    model = Block().to(dtype).eval().requires_grad_(False)
    quantized = copy.deepcopy(model)
    quantize_(quantized, IntScaleConfig())
    x = torch.randn(3, 5, 64, dtype=dtype)
    plain_door, tensor_door = run(model)(x), run(quantized)(x)
    assert torch.equal(plain_door, tensor_door)
    assert 15 < sqnr(model(x).float(), plain_door.float()) < 60  # quantized, and not by much
    assert sqnr(quantized(x).float(), tensor_door.float()) > 35  # eager rounds between ops, a fused graph does not


def test_counts_of_the_passes():
    model = Block().eval()
    report = intscale_compile.explain(model, torch.randn(2, 64))
    matched = {name: count for name, count in report.pass_counts.items() if count}
    assert matched == {"match": 6, "insert_qdq": 6, "share_quantize": 3, "merge_siblings": 2, "fuse": 3}
    assert (report.gemms, report.activation_quantizations, len(report.fallbacks)) == (3, 3, 0)
    assert tuple(report.pass_counts) == tuple(p.name for p in PASSES)


@pytest.mark.generated
def test_plain_inductor_runs_the_tensor():
    model = nn.Sequential(nn.Linear(64, 48), nn.SiLU()).eval()
    quantize_(model, IntScaleConfig())
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert sqnr(model(x), torch.compile(model, fullgraph=True)(x)) > 35


W = torch.randn(48, 64)
BIAS = torch.randn(48)
FORMS = {
    "linear": (lambda x, w, b: torch.nn.functional.linear(x, w, b), False, True),
    "linear keywords": (lambda x, w, b: torch.nn.functional.linear(input=x, weight=w, bias=b), False, True),
    "matmul t": (lambda x, w, b: torch.matmul(x, w.t()), False, False),
    "@ T": (lambda x, w, b: x @ w.T, False, False),
    "@ mT": (lambda x, w, b: x @ w.mT, False, False),
    "method transpose": (lambda x, w, b: x.matmul(w.transpose(0, 1)), False, False),
    "permute": (lambda x, w, b: x @ w.permute(1, 0), False, False),
    "@ [K, N]": (lambda x, w, b: x @ w, True, False),
    "matmul [K, N]": (lambda x, w, b: torch.matmul(x, w), True, False),
    "mm [K, N]": (lambda x, w, b: torch.mm(x.view(-1, 64), w), True, False),
    "method mm t": (lambda x, w, b: x.view(-1, 64).mm(w.t()), False, False),
    "addmm [K, N]": (lambda x, w, b: torch.addmm(b, x.view(-1, 64), w), True, True),
    "method addmm t": (lambda x, w, b: b.addmm(x.view(-1, 64), w.t()), False, True),
    "cast weight": (lambda x, w, b: torch.nn.functional.linear(x, w.to(x.dtype)), False, False),
}


@pytest.mark.parametrize("door", ["plain", "tensor"])
def test_every_form_of_a_product_is_matched(door):
    """All in one graph, each with a weight of its own, and not merged: one product for each form."""
    # A cast of a quantized weight to its own dtype is the plain form.
    forms = {name: form for name, form in FORMS.items() if (door, name) != ("tensor", "cast weight")}

    def weight_of(kn):
        if door == "plain":
            return W.t().contiguous() if kn else W.clone()
        return IntScaleTensor.from_hp(W).t() if kn else IntScaleTensor.from_hp(W)

    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            weights = [weight_of(kn) for _, kn, _ in forms.values()]
            self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in weights])
            self.bias = nn.Parameter(BIAS, requires_grad=False)

        def forward(self, x):
            return [f(x, weight, self.bias) for (f, _, _), weight in zip(forms.values(), self.weights)]

    module, x, options = Products(), torch.randn(2, 3, 64), {"intscale.disable_passes": ["merge_siblings"]}
    with torch.no_grad():
        found = dict(zip(forms, rewritten(module, **options)(x), strict=True))
    expected = {True: w4a8(x, W, BIAS), False: w4a8(x, W)}
    for name, (_, _, has_bias) in forms.items():
        assert torch.equal(found[name].view(2, 3, 48), expected[has_bias]), name
    report = intscale_compile.explain(module, x, options=options)
    assert report.gemms == len(forms) and not report.fallbacks


def test_activations_of_any_rank():
    module = nn.Linear(64, 48).requires_grad_(False)
    for shape in ((64,), (1, 64), (7, 64), (2, 3, 4, 64), (0, 64)):
        torch._dynamo.reset()  # static sizes
        x = torch.randn(shape)
        assert torch.equal(rewritten(module)(x), w4a8(x, module.weight, module.bias)), shape


@pytest.mark.parametrize("door", ["plain", "tensor"])
def test_products_that_feed_each_other_directly(door):
    """As in a low-rank factorization; a product may also be the bias of the next."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 48), nn.Linear(48, 64)).requires_grad_(False)
    weights = [(layer.weight, layer.bias) for layer in model]
    x = expected = torch.randn(4, 64)
    for weight, bias in weights:
        expected = w4a8(expected, weight, bias)
    if door == "tensor":
        quantize_(model, IntScaleConfig())
    assert torch.equal(rewritten(model)(x), expected)


def test_dynamic_batch_and_sequence_compile_once():
    model = Block().eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("intscale")
    run = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for shape in [(2, 5, 64), (3, 7, 64), (9, 2, 64)]:
            x = torch.randn(shape)
            assert sqnr(model(x), run(x)) > 15
    assert counter.frame_count == 1


def test_graph_breaks():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model, x = Broken().eval(), torch.randn(2, 64)
    report = intscale_compile.explain(model, x)
    assert (report.graphs, report.gemms, len(report.fallbacks)) == (2, 2, 0)
    with torch.no_grad():
        y = torch.compile(model, backend="intscale")(x)
    torch.testing.assert_close(y, w4a8(w4a8(x, model.a.weight, model.a.bias), model.b.weight, model.b.bias))


def test_training_weights_are_left_alone_with_a_warning(caplog):
    intscale_compile.reasons.log_once.cache_clear()
    module, x = nn.Linear(64, 48), torch.randn(4, 64)
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        y = compiled(module)(x)
    assert torch.allclose(y, module(x), atol=1e-5)
    y.sum().backward()
    assert module.weight.grad is not None
    assert sum("torch.no_grad()" in r.message for r in caplog.records) >= 1


def test_no_grad_inside_the_graph_is_seen():
    module, x = nn.Linear(64, 48), torch.randn(4, 64)

    @torch.compile(backend="intscale", fullgraph=True)
    def run(x):
        with torch.no_grad():
            return module(x)

    torch.testing.assert_close(run(x), w4a8(x, module.weight, module.bias).detach())


@pytest.mark.parametrize("backend", ["intscale", "inductor"])
def test_gradients_go_straight_through(backend):
    """Quantized weights, trainable norm and bias: the usual first call without no_grad."""
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32))
    quantize_(model, IntScaleConfig())
    x = torch.randn(5, 64, requires_grad=True)
    grads = {}
    for name, run in (("eager", model), ("compiled", torch.compile(model, backend=backend, fullgraph=True))):
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        grads[name] = [x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert len(grads["eager"]) == len(grads["compiled"]) == 5
    for a, b in zip(grads["eager"], grads["compiled"]):
        assert sqnr(a, b) > 25
    dense = copy.deepcopy(model)
    for layer in (dense[1], dense[3]):
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    x.grad = None
    dense(x).square().sum().backward()
    assert sqnr(x.grad, grads["compiled"][0]) > 20


def test_autocast_keeps_its_output_dtype():
    module, x = nn.Linear(64, 48).requires_grad_(False), torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, y = module(x), compiled(module)(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert sqnr(expected.float(), y.float()) > 15


def test_options_reach_their_place():
    model, x = Block().eval().requires_grad_(False), torch.randn(4, 64)
    options = {"intscale.group_size": 32, "intscale.disable_passes": ["merge_siblings"]}
    y = compiled(model, options={**options, "max_fusion_size": 8})(x)
    assert sqnr(model(x), y) > 15
    report = intscale_compile.explain(model, x, options=options)
    assert report.gemms == 6 and {layer.group_size for layer in report.layers} == {32}
    report = intscale_compile.explain(model, x, options={"intscale.skip": r"(q|k)\.weight"})
    assert [layer.reason for layer in report.fallbacks] == ["EXCLUDED", "EXCLUDED"]


def test_modes():
    model, x = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32)).requires_grad_(False), torch.randn(4, 64)
    y = compiled(model)(x)
    torch._dynamo.reset()
    assert torch.equal(y, compiled(model, mode="reduce-overhead")(x))


def test_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(Exception, match="intscale.group_size") as caught:
        compiled(nn.Linear(64, 48), options={"intscale.groupsize": 32})(torch.randn(2, 64))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), ConfigError)


def test_what_quantize_left_out_stays_out():
    model, x = Block().eval().requires_grad_(False), torch.randn(4, 64)
    quantize_(model, IntScaleConfig(), filter_fn=lambda m, name: name in ("q", "k", "v"))
    report = intscale_compile.explain(model, x)
    assert {layer.name: layer.reason for layer in report.layers if layer.reason} == {
        "gate.weight": "NOT_SELECTED",
        "up.weight": "NOT_SELECTED",
        "down.weight": "NOT_SELECTED",
    }
    assert intscale_compile.explain(model, x, options={"intscale.quantize_plain": True}).fallbacks == ()


def test_mixed_formats_are_not_merged():
    model, x = Block(bias=False).eval().requires_grad_(False), torch.randn(4, 64)
    quantize_(model, IntScaleConfig(), filter_fn=lambda m, name: name in ("q", "gate", "up", "down"))
    quantize_(model, IntScaleConfig(weight_bits=8), filter_fn=lambda m, name: name in ("k", "v"))
    report = intscale_compile.explain(model, x)
    assert report.gemms == 4 and report.activation_quantizations == 3
    assert sqnr(model(x), rewritten(model)(x)) > 35


def test_in_place_write_between_two_readers_is_respected():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

        def forward(self, x):
            x = x * 1.0
            first = self.a(x)
            x.add_(1.0)
            return first, self.b(x)

    model, x = Writes().requires_grad_(False), torch.randn(4, 64)
    first, second = rewritten(model)(x)
    torch.testing.assert_close(first, w4a8(x, model.a.weight))
    torch.testing.assert_close(second, w4a8(x + 1.0, model.b.weight))


def test_view_that_a_slice_does_not_allow():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.a(x).view(-1), self.b(x).view(4, 2, 16).transpose(0, 1)

    model, x = Flat().requires_grad_(False), torch.randn(4, 64)
    a, b = rewritten(model)(x)
    torch.testing.assert_close(a, w4a8(x, model.a.weight).view(-1))
    torch.testing.assert_close(b, w4a8(x, model.b.weight).view(4, 2, 16).transpose(0, 1))
