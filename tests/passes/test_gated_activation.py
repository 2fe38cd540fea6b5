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
from tests.support.graphs import Together, arguments, assert_true_metadata, capture, count, run

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


def rewritten(model, *xs, dynamic=None, **options) -> GraphRewrite:
    rewrite = capture(model, *xs, dynamic=dynamic, **{**ON, **options})
    apply_passes(rewrite, PASSES)
    return rewrite


@pytest.mark.parametrize("dynamic", [False, True])
def test_matched(dynamic):
    model, xs = Together(MATCHED.values()), [activations() for _ in MATCHED]
    rewrite = rewritten(model, *xs, dynamic=dynamic)
    gated = [node for node in rewrite.graph.nodes if node.target is GATED_OP]
    assert rewrite.counts["gated_activation"] == len(gated) == len(MATCHED) and not count(rewrite, LINEAR_OP)
    names = " ".join(str(node.target) for node in rewrite.graph.nodes if node.op.startswith("call"))
    assert not any(
        word in names.replace("w4a8_gated", "") for word in ("silu", "gelu", "mul", "split", "chunk", "getitem_")
    )
    assert_true_metadata(rewrite)
    without = run(rewritten(model, *xs, dynamic=dynamic, **{"intscale.disable_passes": ["gated_activation"]}))
    for (name, part), node, y, other, x in zip(MATCHED.items(), gated, run(rewrite), without, xs, strict=True):
        assert len(node.meta["intscale_candidates"]) == len(part.parts), name
        assert node.meta["intscale_tensor"] is not None, name
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert y.shape == (*x.shape[:-1], FEATURES) and y.is_contiguous(), name


def test_idempotent():
    rewrite = rewritten(MATCHED["silu"], activations())
    code = rewrite.gm.code
    again = GraphRewrite(rewrite.gm, arguments(rewrite), rewrite.settings)
    apply_passes(again, (GATED_ACTIVATION,))
    assert again.counts["gated_activation"] == 0 and again.gm.code == code


def test_forms_that_are_left_alone():
    models = {name: model for name, (model, options) in LEFT_ALONE.items() if not options}
    rewrite = rewritten(Together(models.values()), *(activations() for _ in models))
    parts = sum(1 if len(model.parts) == 1 else 2 for model in models.values())
    taken = [
        c.name for node in rewrite.graph.nodes if node.target is GATED_OP for c in node.meta["intscale_candidates"]
    ]
    assert taken == [] and rewrite.counts["gated_activation"] == 0
    assert len(models) <= count(rewrite, LINEAR_OP) <= parts


@pytest.mark.parametrize("name", [name for name, (_, options) in LEFT_ALONE.items() if options])
def test_left_alone_with_options(name):
    model, options = LEFT_ALONE[name]
    rewrite = rewritten(model, activations(), **options)
    assert rewrite.counts["gated_activation"] == count(rewrite, GATED_OP) == 0 and count(rewrite, LINEAR_OP)


@pytest.mark.parametrize("dynamic", [False, True])
def test_few_tokens(dynamic):
    rewrite = rewritten(MATCHED["silu"], activations(LEAST_TOKENS - 2), dynamic=dynamic)
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
            rewrite = rewritten(MATCHED["silu"], activations(tokens), dynamic=dynamic, **OFF)
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
    """Through Inductor, where the op stays whole: near the unfused graph, in one graph for every number of tokens."""
    model, x, graphs = MATCHED["silu"], activations(), []
    (expected,) = run(rewritten(model, x, **OFF))

    def backend(gm, inputs):
        graphs.append(gm)
        return intscale(gm, inputs, options=ON)

    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        for tokens in (7, 5, 100):
            torch.testing.assert_close(compiled(x[:, :tokens].contiguous()), expected[:, :tokens], rtol=1e-5, atol=1e-5)
            if not dynamic:
                break
    assert len(graphs) == (1 if dynamic else 2)


def test_explain_counts_it():
    report = explain(MATCHED["silu"], activations(), options=ON)
    assert report.gemms == 1 and report.pass_counts["gated_activation"] == 1
    assert all(layer.quantized and layer.kernel == "oneDNN fold + silu" for layer in report.layers)


FAMILIES = (
    ("Llama", "silu", {}),
    ("Phi3", "silu", {"pad_token_id": 0}),
    ("Gemma2", "gelu_pytorch_tanh", {"head_dim": 32}),
)


def feed_forward(family, layers=1, **extra):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2, vocab_size=128)
    config = getattr(transformers, f"{family}Config")(num_key_value_heads=2, **sizes, **extra)
    return getattr(transformers, f"{family}Model")(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family, activation, extra", FAMILIES)
def test_feed_forward_of_transformers(family, activation, extra):
    """Its activation is a module from a table; gate and up are two weights, or one in Phi-3."""
    rewrite = rewritten(feed_forward(family, **extra).layers[0].mlp, activations())
    (node,) = (node for node in rewrite.graph.nodes if node.target is GATED_OP)
    assert rewrite.counts["gated_activation"] == 1 and (activation == "silu") == ("silu" in node.args)


@pytest.mark.slow
@pytest.mark.parametrize("family, activation, extra", FAMILIES)
def test_a_transformers_model(family, activation, extra):
    """Every MLP of a small model."""
    report = explain(feed_forward(family, 2, **extra), torch.randint(0, 128, (2, LEAST_TOKENS // 2)), options=ON)
    assert report.pass_counts["gated_activation"] == 2
