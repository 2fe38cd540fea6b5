"""The gated activation pass: the forms that it takes, what it leaves alone, and results near the unfused ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from intscale_compile import explain
from intscale_compile.backend import intscale
from intscale_compile.compile.binding import rewrite_graph
from intscale_compile.compile.options import parse_options
from intscale_compile.kernels.w4a8_gated import GATED_OP
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.passes import PASSES, GraphRewrite, apply_passes
from intscale_compile.passes.gated_activation import (
    GATED_ACTIVATION,
    LEAST_TOKENS,
    LEAST_TOKENS_WITHOUT_GRAPHS,
    _worthwhile,
)
from tests.support.graphs import arguments, assert_true_metadata, capture, count, run

K, FEATURES = 64, 128
ON = {"intscale.force_passes": ["gated_activation"]}
OFF = {"intscale.disable_passes": ["gated_activation"]}


class Mlp(nn.Module):
    """A gate and an up projection, as two linears or as one."""

    def __init__(self, product, fused=False, bias=False, features=FEATURES):
        super().__init__()
        self.product = product
        sizes = (2 * features,) if fused else (features, features)
        self.parts = nn.ModuleList(nn.Linear(K, size, bias=bias) for size in sizes)
        self.requires_grad_(False)

    def forward(self, x):
        return self.product(*(part(x) for part in self.parts))


def halves(y):
    return y[..., :FEATURES], y[..., FEATURES:]


MATCHED = {
    "silu": Mlp(lambda gate, up: F.silu(gate) * up),
    "bias": Mlp(lambda gate, up: F.silu(gate) * up, bias=True),
    "up-first-in-product": Mlp(lambda gate, up: up * F.silu(gate)),
    "gelu": Mlp(lambda gate, up: F.gelu(gate) * up),
    "gelu-tanh": Mlp(lambda gate, up: torch.mul(F.gelu(gate, approximate="tanh"), up)),
    "module": Mlp(lambda gate, up: nn.SiLU()(gate).mul(up)),
    "chunk": Mlp(lambda y: (lambda gate, up: up * F.silu(gate))(*y.chunk(2, dim=-1)), fused=True),
    "split": Mlp(lambda y: (lambda gate, up: F.gelu(gate) * up)(*torch.split(y, FEATURES, -1)), fused=True),
    "slices": Mlp(lambda y: (lambda gate, up: F.silu(gate) * up)(*halves(y)), fused=True),
}


def swapped(y):
    up, gate = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def both_read(gate, up):
    return F.silu(gate) * up + up


LEFT_ALONE = {
    "gate-second": (Mlp(swapped, fused=True), {}),
    "other-reader-of-up": (Mlp(both_read), {}),
    "other-reader-of-gate": (Mlp(lambda gate, up: F.silu(gate) * up + gate), {}),
    "activation-returned": (Mlp(lambda gate, up: (lambda a: (a * up, a))(F.silu(gate))), {}),
    "whole-returned": (Mlp(lambda y: (F.silu(halves(y)[0]) * halves(y)[1], y), fused=True), {}),
    "in-place": (Mlp(lambda gate, up: F.silu(gate, inplace=True) * up), {}),
    "relu": (Mlp(lambda gate, up: F.relu(gate) * up), {}),
    "two-activations": (Mlp(lambda gate, up: F.silu(gate) * F.silu(up)), {}),
    "scaled": (Mlp(lambda gate, up: F.silu(gate) * 2.0), {}),
    "added": (Mlp(lambda gate, up: F.silu(gate) + up), {}),
    "overlapping-slices": (Mlp(lambda y: F.silu(y[..., :FEATURES]) * y[..., FEATURES - 1 : -1], fused=True), {}),
    "other-dimension": (Mlp(lambda y: (lambda a, b: F.silu(a) * b)(*y.chunk(2, dim=0)), fused=True), {}),
    "not-whole-tiles": (Mlp(lambda gate, up: F.silu(gate) * up, features=96), {}),
    "wider-product": (Mlp(lambda gate, up: F.silu(gate).double() * up), {}),
    "off": (MATCHED["silu"], {"intscale.disable_passes": ["gated_activation"]}),
    "cpu-by-default": (MATCHED["silu"], {"intscale.force_passes": []}),
    "not-merged": (MATCHED["silu"], {"intscale.disable_passes": ["merge_siblings"]}),
}


def activations(tokens: int = LEAST_TOKENS) -> torch.Tensor:
    return torch.randn(2, tokens // 2, K)


def rewritten(model, x, dynamic=None, **options) -> GraphRewrite:
    rewrite = capture(model, x, dynamic=dynamic, **{**ON, **options})
    apply_passes(rewrite, PASSES)
    return rewrite


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MATCHED)
def test_matched(name, dynamic):
    model, x = MATCHED[name], activations()
    rewrite = rewritten(model, x, dynamic)
    assert rewrite.counts["gated_activation"] == count(rewrite, GATED_OP) == 1 and not count(rewrite, LINEAR_OP)
    names = " ".join(str(node.target) for node in rewrite.graph.nodes if node.op.startswith("call"))
    assert not any(
        word in names.replace("w4a8_gated", "") for word in ("silu", "gelu", "mul", "split", "chunk", "getitem_")
    )
    (node,) = (node for node in rewrite.graph.nodes if node.target is GATED_OP)
    assert len(node.meta["intscale_candidates"]) == len(model.parts) and node.meta["intscale_tensor"] is not None
    assert_true_metadata(rewrite)
    (y,) = run(rewrite)
    without = rewritten(model, x, dynamic, **{"intscale.disable_passes": ["gated_activation"]})
    torch.testing.assert_close(y, run(without)[0], rtol=1e-5, atol=1e-5)
    assert y.shape == (*x.shape[:-1], FEATURES) and y.is_contiguous()


def test_idempotent():
    rewrite = rewritten(MATCHED["silu"], activations())
    code = rewrite.gm.code
    again = GraphRewrite(rewrite.gm, arguments(rewrite), rewrite.settings)
    apply_passes(again, (GATED_ACTIVATION,))
    assert again.counts["gated_activation"] == 0 and again.gm.code == code


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    model, options = LEFT_ALONE[name]
    rewrite = rewritten(model, activations(), **options)
    assert rewrite.counts["gated_activation"] == count(rewrite, GATED_OP) == 0 and count(rewrite, LINEAR_OP)


@pytest.mark.parametrize("dynamic", [False, True])
def test_few_tokens(dynamic):
    rewrite = rewritten(MATCHED["silu"], activations(LEAST_TOKENS - 2), dynamic)
    assert rewrite.counts["gated_activation"] == 0


def test_tokens_needed_on_a_gpu():
    """Fewer where CUDA graphs hide the call from the host; the hint decides where the number is symbolic."""
    for dynamic in (False, True):
        for tokens, graphs, expected in (
            (LEAST_TOKENS, True, True),
            (LEAST_TOKENS - 2, True, False),
            (LEAST_TOKENS_WITHOUT_GRAPHS, False, True),
            (LEAST_TOKENS_WITHOUT_GRAPHS - 2, False, False),
        ):
            rewrite = rewritten(MATCHED["silu"], activations(tokens), dynamic, **OFF)
            (linear,) = (node for node in rewrite.graph.nodes if node.target is LINEAR_OP)
            value = linear.meta["example_value"]
            # A fake tensor that says that it is on a GPU: the shape is the traced one, symbols and all.
            linear.meta["example_value"] = type("OnGpu", (), {"device": torch.device("cuda"), "shape": value.shape})()
            on = GraphRewrite(rewrite.gm, (), capture(lambda x: x + 1, torch.zeros(1)).settings, cuda_graphs=graphs)
            assert _worthwhile(on, linear) is expected, (dynamic, tokens, graphs)


def test_autograd_is_left_alone():
    model, x = MATCHED["bias"], activations().requires_grad_()
    rewrites = []

    def backend(gm, example_inputs):
        rewrites.append(rewrite_graph(gm, example_inputs, parse_options(None, ON)[0]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    assert rewrites[0].counts["gated_activation"] == 0 and count(rewrites[0], LINEAR_OP) == 1


@pytest.mark.generated
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled(dynamic):
    """Through Inductor, where the op stays whole: near the unfused graph, at other numbers of tokens too."""
    model, x = MATCHED["silu"], activations()
    results = {}
    for option in ("force", "disable"):
        torch._dynamo.reset()
        compiled = torch.compile(
            model, backend="intscale", dynamic=dynamic, options={f"intscale.{option}_passes": ["gated_activation"]}
        )
        with torch.no_grad():
            results[option] = [compiled(x), compiled(x[:, :7])]
    for a, b in zip(results["force"], results["disable"]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_graph_for_every_number_of_tokens():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return intscale(gm, inputs, options=ON)

    run = torch.compile(MATCHED["silu"], backend=backend, dynamic=True)
    with torch.no_grad():
        for tokens in (300, 5, 400):
            run(activations()[0, :1].repeat(tokens, 1))
    assert len(graphs) == 1


def test_explain_counts_it():
    report = explain(MATCHED["silu"], activations(), options=ON)
    assert report.gemms == 1 and report.pass_counts["gated_activation"] == 1
    assert all(layer.quantized and layer.kernel == "oneDNN fold + silu" for layer in report.layers)


def test_a_transformers_model():
    """Every MLP of a small Llama, whose activation is a module from a table, and of a small Phi-3."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
    for model_type, extra in (("Llama", {}), ("Phi3", {"pad_token_id": 0}), ("Gemma2", {"head_dim": 32})):
        config = getattr(transformers, f"{model_type}Config")(num_key_value_heads=2, **sizes, **extra)
        model = getattr(transformers, f"{model_type}Model")(config).eval().requires_grad_(False)
        report = explain(model, torch.randint(0, 128, (2, LEAST_TOKENS // 2)), options=ON)
        assert report.pass_counts["gated_activation"] == 2, model_type
