"""Kinds of models: every linear matched or given a reason, both doors alike, and results near those in full precision."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor, linears_and_experts

pytest.importorskip("transformers")
from tests.support.model_families import FAMILIES, Family, linear_modules  # noqa: E402

INDUCTOR = (pytest.param("gpt2", marks=pytest.mark.generated),)
SLOW_INDUCTOR = ("gpt2", "gemma2", "vit", "qwen3", "opt", "phi3", "t5")
# Vectorized C++ takes a compiler twice as long, and is not what these tests are about.
QUICK_CPP = {"cpp.simdlen": 1}


@dataclass(eq=False)
class Prepared:
    family: Family
    model: nn.Module
    quantized: nn.Module
    inputs: dict

    @functools.cached_property
    def explained(self):
        """``explain`` of the quantized model, once, and the outputs of the rewritten graph that it ran."""
        return explained(self.quantized, self.inputs)


def prepare(name, layers=None):
    torch.manual_seed(0)
    torch._dynamo.reset()
    family = FAMILIES[name]
    model = family.build(layers)
    quantized = copy.deepcopy(model)
    quantize_(quantized, IntScaleConfig(), filter_fn=linears_and_experts)
    return Prepared(family, model, quantized, family.inputs())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from more threads, and lose much where other processes want the cores as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# One of each mechanism: Conv1D and padded groups; two kinds of layers and a gate; q, k, v and the feed-forward's first layer in
# one product, and an output embedding of its own; convolutions and a product inside of an operator; two stacks, whose cross
# attentions share one product.
QUICK = ("gpt2", "gemma2", "phi", "siglip_vision", "t5")


def families(quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=families(QUICK))
def prepared(request):
    return prepare(request.param)


def outputs(result):
    return [value for value in result.values() if isinstance(value, torch.Tensor)]


def explained(model, inputs):
    """``explain`` of a model, and the outputs of the rewritten graph that it ran."""
    kept = []
    hook = model.register_forward_hook(lambda module, args, result: kept.append(result))
    try:
        report = intscale_compile.explain(model, **inputs)
    finally:
        hook.remove()
    return report, outputs(kept[-1])


def snr(results, references):
    """Signal-to-noise ratio in dB, of the output that has the least."""
    ratios = []
    for value, reference in zip(results, references, strict=True):
        noise = (value.double() - reference.double()).square().sum().clamp_min(1e-300)
        ratios.append(float(10 * torch.log10(reference.double().square().sum() / noise)))
    return min(ratios)


OPERANDS = {
    nn.functional.linear: lambda x, weight, bias=None: (x, weight, bias),
    torch.addmm: lambda bias, x, weight: (x, weight.t(), bias),
    torch.Tensor.matmul: lambda x, weight: (x, weight.t(), None),
}


class Float64Reference(TorchFunctionMode):
    """Computes products with quantized weights from the format's definition, in float64, without any of our kernels."""

    products = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in OPERANDS and any(isinstance(a, IntScaleTensor) for a in args):
            self.products += 1
            x, weight, bias = OPERANDS[func](*args)
            step = x.double().abs().amax(-1, keepdim=True) / 127
            y = (x / step).round() * step @ weight.dequantize(torch.float64).t()
            return (y if bias is None else y + bias).to(x.dtype)
        return func(*args, **(kwargs or {}))


def test_every_product_is_matched_or_has_its_reason(prepared):
    family, report, results = prepared.family, *prepared.explained
    tied = {id(m.weight) for m in prepared.model.modules() if isinstance(m, nn.Embedding)}
    found = {f"{name}.weight" for name, m in linear_modules(prepared.model).items() if id(m.weight) not in tied}
    assert {layer.name: layer.reason for layer in report.fallbacks} == family.rest
    assert {layer.name for layer in report.layers if layer.quantized} == found - set(family.rest)
    assert sum(layer.quantized for layer in report.layers) == family.linears(family.layers)
    assert (report.graphs, report.gemms) == (1, family.gemms(family.layers))
    with torch.no_grad():
        eager = outputs(prepared.quantized(**prepared.inputs))
    assert snr(results, eager) > 120


# Weights that are kept transposed, and products that are left alone.
QUICK_DOORS = ("gpt2", "siglip_vision")


@pytest.mark.parametrize("prepared", families(QUICK_DOORS), indirect=True)
def test_both_doors_are_alike(prepared):
    """A plain model and one of quantized weights: the same layers, graph and bits."""
    (plain, results), (tensors, again) = explained(prepared.model, prepared.inputs), prepared.explained
    assert plain.layers == tensors.layers and plain.quantized_parameters == tensors.quantized_parameters
    assert (plain.graphs, plain.gemms) == (tensors.graphs, tensors.gemms)
    assert all(torch.equal(a, b) for a, b in zip(results, again)), "the doors differ"


def test_results_are_near_those_in_full_precision(prepared):
    model, inputs, family = prepared.model, prepared.inputs, prepared.family
    with torch.no_grad():
        exact, quantized = outputs(model(**inputs)), outputs(prepared.quantized(**inputs))
        with Float64Reference() as mode:
            reference = outputs(prepared.quantized(**inputs))
        wrong = wrong_row(copy.deepcopy(model), prepared.quantized)(**inputs)
    seen, with_wrong_row = snr(quantized, exact), snr(outputs(wrong), exact)
    print(
        f"{seen:.1f} dB, with a wrong row {with_wrong_row:.1f} dB; to the reference {snr(quantized, reference):.0f} dB"
    )
    assert mode.products == family.linears(family.layers)
    assert snr(quantized, reference) > family.to_reference
    assert seen > family.snr > with_wrong_row


def wrong_row(model, quantized):
    """A model whose last quantized weight has its output rows shifted by one: an error that the bound must see."""
    names = [name for name, m in linear_modules(quantized).items() if isinstance(m.weight, IntScaleTensor)]
    weight = model.get_submodule(names[-1]).weight
    weight.copy_(weight.roll(1, -1 if type(model.get_submodule(names[-1])).__name__ == "Conv1D" else 0))
    return model


@pytest.mark.parametrize("name", [*INDUCTOR, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_INDUCTOR)])
def test_inductor(name, request):
    """The whole backend, one layer: near the eager path (xq may differ by one unit), in slow tests both doors to the bit."""
    prepared = prepare(name, layers=1)
    both = [prepared.model, prepared.quantized]
    results = []
    with torch.no_grad():
        for model in both if request.node.get_closest_marker("slow") else both[1:]:
            compiled = torch.compile(model, backend="intscale", fullgraph=True, options=QUICK_CPP)
            results.append(outputs(compiled(**prepared.inputs)))
        eager = outputs(prepared.quantized(**prepared.inputs))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1]))
    assert snr(results[0], eager) > 45
