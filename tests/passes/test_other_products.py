"""Products that no pass quantizes: each is listed with its weight's name and its reason, none is skipped."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.explanation.layers import eager_layer
from intscale_compile.explanation.parameters import Rows
from intscale_compile.explanation.records import LayerReport
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from intscale_compile.passes import PASSES, apply_passes
from intscale_compile.reasons import Reason
from intscale_compile.versions import version_of
from tests.support.compiled import rewritten
from tests.support.graphs import capture, count


class Layer(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        self.requires_grad_(False)

    def forward(self, x):
        return self.function(self, x)


def weight(*shape):
    return torch.randn(*shape)


COMPUTED = {
    "slice": lambda m, x: x[:, :32] @ m.w[:, :32].t(),
    "scaled": lambda m, x: x.matmul(m.w * 2),
    "addmm": lambda m, x: torch.addmm(m.w[0], x, m.w + 1),
    "einsum": lambda m, x: torch.einsum("mk,nk->mn", x, m.w[:32] * 2),
}


def candidates(model, *inputs):
    rewrite = capture(model, *inputs)
    apply_passes(rewrite, PASSES)
    return rewrite, {c.name: c.reason for c in rewrite.candidates}


@pytest.mark.parametrize("form", COMPUTED)
def test_computed_weight(form):
    rewrite, found = candidates(Layer(COMPUTED[form], w=weight(64, 64)), torch.randn(4, 64))
    assert found == {"w": Reason.NOT_CONSTANT} and count(rewrite, LINEAR_OP) == 0


def test_products_without_a_matrix_parameter_are_no_candidates():
    model = Layer(lambda m, x: x @ x.t() @ (x * m.scale), scale=weight(64))
    assert candidates(model, torch.randn(64, 64))[1] == {}
    rotary = Layer(lambda m, x: m.frequencies[None, :, None] @ x[None, None, 0], frequencies=weight(32))
    assert candidates(rotary, torch.randn(4, 64))[1] == {}


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d])
def test_convolution(kind):
    rank = 3 if kind is nn.Conv2d else 2
    model = Layer(lambda m, x: m.conv(x), conv=kind(64, 64, 1))
    _, found = candidates(model, torch.randn(1, 64, *[8] * (rank - 1)))
    assert found == {"conv.weight": Reason.CONVOLUTION}


def test_attention_module_is_one_operator():
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    model = Layer(lambda m, x: m.attention(x, x, x)[0], attention=attention)
    _, found = candidates(model, torch.randn(2, 5, 64))
    assert found == dict.fromkeys(["attention.in_proj_weight", "attention.out_proj.weight"], Reason.ONE_OPERATOR)


def encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)


def test_encoder_layer_is_one_operator():
    _, found = candidates(encoder(), torch.randn(2, 5, 64))
    assert len(found) == 4 and set(found.values()) == {Reason.ONE_OPERATOR}


@pytest.mark.parametrize("quantized", [False, True])
def test_mend_of_the_encoder_layer(quantized):
    model = encoder()
    if quantized:
        quantize_(model, IntScaleConfig())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        _, found = candidates(model, torch.randn(2, 5, 64))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert {name for name, reason in found.items() if reason is None} == {
        "layers.0.linear1.weight",
        "layers.0.linear2.weight",
    }


def test_body_of_a_higher_order_operator_names_its_weights():
    model = Layer(
        lambda m, x: torch.utils.checkpoint.checkpoint(m.linear, x, use_reentrant=False), linear=nn.Linear(64, 32)
    )
    assert candidates(model, torch.randn(4, 64))[1] == {"linear.weight": Reason.SUBGRAPH}
    report = intscale_compile.explain(model, torch.randn(4, 64))
    assert [(layer.name, layer.reason) for layer in report.layers] == [("linear.weight", "SUBGRAPH")]


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        self.lstm = nn.LSTM(64, 64)
        self.requires_grad_(False)

    @torch._dynamo.disable
    def outside(self, x):
        return self.second(x)

    def forward(self, x):
        return self.outside(self.first(x))


def test_explain_lists_what_no_graph_holds():
    report = intscale_compile.explain(Broken(), torch.randn(4, 64))
    left = {layer.name: layer.reason for layer in report.fallbacks}
    recurrent = dict.fromkeys(("lstm.weight_ih_l0", "lstm.weight_hh_l0"), "RECURRENT")
    assert left == {**dict.fromkeys(("second.weight", "third.weight"), "NOT_REACHED"), **recurrent}
    assert [layer.name for layer in report.layers if layer.quantized] == ["first.weight"]


@pytest.mark.skipif(version_of("torch") < (2, 12), reason="after the graph break Dynamo fails inside torchao")
def test_explain_of_a_quantized_encoder_whose_fast_path_breaks_the_graph():
    model = encoder()
    quantize_(model, IntScaleConfig(), filter_fn=lambda module, name: name.endswith(("linear1", "linear2")))  # named
    report = intscale_compile.explain(model, torch.randn(2, 5, 64))
    rows = {layer.name.rpartition("layers.0.")[2]: (layer.reason, layer.kernel) for layer in report.layers}
    eager, plain = (None, "eager: in no graph"), ("NOT_REACHED", "")
    assert rows == {
        "linear1.weight": eager,
        "linear2.weight": eager,
        "self_attn.in_proj_weight": plain,
        "self_attn.out_proj.weight": plain,
    }


def test_bias_that_is_a_view_is_fused():
    model = Layer(lambda m, x: F.linear(x, m.w, m.b[1]), w=weight(32, 64), b=weight(2, 32))
    rewrite, found = candidates(model, torch.randn(4, 64))
    assert found == {"w": None} and count(rewrite, LINEAR_OP) == 1


BY_NAME = {
    "linear": lambda m, x: F.linear(input=x, weight=m.w, bias=m.b),
    "weight": lambda m, x: F.linear(x, weight=m.w, bias=m.b),
    "computed": lambda m, x: F.linear(x, bias=m.b, weight=m.w) + F.linear(x, weight=m.w * 2),
    "transposed": lambda m, x: torch.matmul(input=x, other=torch.transpose(input=m.w, dim0=0, dim1=1)) + m.b,
    "embedded": lambda m, x: F.linear(x, weight=m.w) + F.embedding(torch.arange(4), weight=m.e),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_by_name(name):
    """I-BERT calls F.linear with weight= and bias=; the passes read arguments by place."""
    layer = Layer(BY_NAME[name], w=weight(64, 64), b=weight(64), e=weight(4, 64))
    x = torch.randn(4, 64)
    report = intscale_compile.explain(layer, x)
    assert [row.quantized for row in report.layers if row.name == "w"] == [True], report
    wanted = layer(x)
    torch._dynamo.reset()
    with torch.no_grad():
        found = rewritten(layer)(x)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.2


def test_several_products_computed_from_one_parameter_are_one_row():
    """SEW-D's relative embeddings are normed once and multiplied in each layer."""

    def forward(m, x):
        normed = F.layer_norm(m.w, (64,))
        return x @ normed.t() + F.linear(x, normed) + x @ (normed * 2)

    report = intscale_compile.explain(nn.Sequential(Layer(forward, w=weight(64, 64))), torch.randn(4, 64))
    assert [(row.name, row.reason) for row in report.layers] == [("0.w", Reason.NOT_CONSTANT.name)]


def test_a_product_with_what_a_quantized_layer_made_is_no_second_row():
    """Wav2Vec2-Conformer's positions go through a linear layer, and then into a product with the queries."""
    rows, packed = Rows(), IntScaleTensor.from_hp(weight(64, 64).detach())
    rows.add(eager_layer("0.w", packed), packed)
    computed = Reason.NOT_CONSTANT
    rows.add(LayerReport("0.w", None, "?", False, computed.name, computed.value), None)
    rows.add(LayerReport("0.other", None, "?", False, computed.name, computed.value), None)
    assert [(row.name, row.quantized) for row in rows.layers] == [("0.w", True), ("0.other", False)]
