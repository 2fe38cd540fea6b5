"""Each mend that can make a layer quantized, followed: afterwards the layer is quantized. And what cannot be mended says so."""

import copy

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.quantization import FqnToConfig, Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from intscale_compile import IntScaleConfig, IntScaleTensor, convert_from_torchao, explain
from intscale_compile.reasons import Reason
from intscale_compile.versions import version_of
from tests.support.reasons import MODELS, Experts, Head, Holder, WithGradients, linear

X = torch.randn(4, 64)


def named_head(model):
    config = FqnToConfig({"lm_head": IntScaleConfig(weight_bits=8), "_default": IntScaleConfig()})
    quantize_(model, config, filter_fn=None)
    return model


def output_embedding():
    return named_head(Head(False)), {}, X


def tied_embedding():
    model = Head(True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    return named_head(model), {}, X


def experts():
    return Experts(lambda w, x: torch.bmm(x.mT.contiguous(), w.mT)), {}, X


def requires_grad():
    return WithGradients().requires_grad_(False), {}, X


def not_constant():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)).requires_grad_(False)
    assert {row.reason for row in explain(layer, X).layers} == {"NOT_CONSTANT"}
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    return layer.requires_grad_(False), {}, X


def foreign_subclass():
    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)))
    assert {row.reason for row in explain(model, X).layers} == {"FOREIGN_SUBCLASS"}
    convert_from_torchao(model)
    return model, {}, X


def non_finite():
    model = MODELS[Reason.NON_FINITE]()
    model.w0[torch.isfinite(model.w0).logical_not()] = 0
    return model, {}, X


def not_selected():
    return MODELS[Reason.NOT_SELECTED]()[0], {"intscale.quantize_plain": True}, X


def convolution():
    conv = MODELS[Reason.CONVOLUTION]()[0]
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer.weight.copy_(conv.weight.squeeze(-1))
    return layer, {}, X


def one_operator(monkeypatch):
    torch.backends.mha.set_fastpath_enabled(False)
    return MODELS[Reason.ONE_OPERATOR]()


MENDED = {
    Reason.OUTPUT_EMBEDDING: output_embedding,
    Reason.TIED_EMBEDDING: tied_embedding,
    Reason.EXPERTS: experts,
    Reason.REQUIRES_GRAD: requires_grad,
    Reason.NOT_CONSTANT: not_constant,
    Reason.UNKNOWN_VIEW: lambda: (Holder(lambda x, w: x @ w.t(), torch.randn(32, 64)), {}, X),
    Reason.FOREIGN_SUBCLASS: foreign_subclass,
    Reason.RAW_PARAMETER: lambda: (MODELS[Reason.RAW_PARAMETER](), {"intscale.quantize_plain": True}, X),
    Reason.NON_FINITE: non_finite,
    Reason.WEIGHT_DTYPE: lambda: (MODELS[Reason.WEIGHT_DTYPE]().to(torch.bfloat16), {}, X),
    Reason.ACTIVATION_DTYPE: lambda: (linear(32, 64).bfloat16(), {}, X.bfloat16()),
    Reason.DEVICE: lambda: (nn.Linear(64, 64).requires_grad_(False), {}, X),
    Reason.LEFT_OPERAND: lambda: (Holder(lambda x, w: (x @ w.t()).t(), torch.randn(32, 64)), {}, X),
    Reason.SCALED_ADDMM: lambda: (
        Holder(lambda x, w, b: torch.addmm(b, x, w) * 2, torch.randn(64, 32), torch.randn(32)),
        {},
        X,
    ),
    Reason.BIAS_SHAPE: lambda: (
        Holder(lambda x, w, b: torch.addmm(b, x, w), torch.randn(64, 32), torch.randn(32)),
        {},
        X,
    ),
    Reason.OVERFLOW_PROOF: lambda: (MODELS[Reason.OVERFLOW_PROOF]()[0], {"intscale.amplifier": "row"}, X),
    Reason.NOT_SELECTED: not_selected,
    Reason.EXCLUDED: lambda: (linear(32, 64), {}, X),
    Reason.PASS_DISABLED: lambda: (linear(32, 64), {}, X),
    Reason.CONVOLUTION: convolution,
    Reason.ONE_OPERATOR: one_operator,
    Reason.NOT_REACHED: lambda: (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False), {}, X),
    Reason.SUBGRAPH: lambda: (MODELS[Reason.SUBGRAPH]().layer.requires_grad_(False), {}, X),
    Reason.UNKNOWN_FORM: lambda: (linear(32, 64), {}, X),
}

# Their mend says that there is none, or needs ranks (below) or another compiler.
WITHOUT = {
    Reason.DIFFERENTIATED, Reason.STRIDES,
    Reason.ROUTER, Reason.ALREADY_QUANTIZED, Reason.FAKE_WEIGHT, Reason.WEIGHT_RANK, Reason.TOO_SMALL, Reason.RECURRENT,
    Reason.EMBEDDING, Reason.NOT_MULTIPLIED, Reason.SHARDED_FORM, Reason.SHARDED_PLAIN,
}  # fmt: skip


@pytest.fixture(autouse=True)
def settings():
    torch._dynamo.reset()
    yield
    torch.backends.mha.set_fastpath_enabled(True)
    torch._dynamo.reset()


@pytest.mark.parametrize("reason", MENDED, ids=lambda reason: reason.name)
def test_the_mend_works(reason, monkeypatch):
    mend = MENDED[reason]
    model, options, x = mend(monkeypatch) if mend is one_operator else mend()
    report = explain(model, x, options=options)
    assert any(row.quantized for row in report.layers), report
    left = {row.name for row in report.layers if row.reason == reason.name}
    assert left <= {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
    }  # ONE_OPERATOR says "at least the two linears"


def test_every_reason_has_a_followed_mend_or_none():
    collectives = {reason for reason in Reason if reason.name.startswith("COLLECTIVE")}
    assert set(MENDED) | WITHOUT | collectives == set(Reason) and not set(MENDED) & WITHOUT


def test_transformers_experts():
    """set_experts_implementation, as EXPERTS says, on a model whose experts run in a loop."""
    sizes = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    config = hf.MixtralConfig(vocab_size=32, num_local_experts=4, **sizes)
    model = hf.MixtralForCausalLM(config).eval().requires_grad_(False)
    block, hidden = model.model.layers[0].mlp, torch.randn(1, 8, 64)
    for implementation, quantized in (("eager", False), ("grouped_mm", True)):
        model.set_experts_implementation(implementation)
        rows = [row for row in explain(block, hidden).layers if row.name.startswith("experts.")]
        assert len(rows) == 2 and all(row.quantized == quantized for row in rows)
        assert quantized or {row.reason for row in rows} == {"EXPERTS"}


@pytest.fixture
def ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


@pytest.mark.parametrize("reason", [Reason.SHARDED_FORM, Reason.SHARDED_PLAIN], ids=lambda reason: reason.name)
def test_sharded(ranks, reason):
    """Quantized first, then sharded, and multiplied with F.linear: what both mends say."""
    model = Holder(
        lambda x, w: F.linear(DTensor.from_local(x, ranks, [Replicate()]), w).to_local(), torch.randn(64, 64)
    )
    packed = nn.Parameter(IntScaleTensor.from_hp(model.w0.detach()), requires_grad=False)
    model.w0 = nn.Parameter(distribute_tensor(packed, ranks, [Shard(0)], src_data_rank=None), requires_grad=False)
    (row,) = explain(model, X).layers
    assert row.quantized


class Beside(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self):
        super().__init__()
        self.first, self.recurrent, self.last = nn.Linear(64, 64), nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 64)

    def forward(self, x):
        return self.last(self.recurrent(self.first(x))[0])


def test_a_function_skipped_for_a_recurrent_layer(monkeypatch):
    model, x = Beside().eval().requires_grad_(False), torch.randn(2, 3, 64)
    report = explain(model, x)
    if {row.name: row.reason for row in report.layers}[
        "first.weight"
    ] is None:  # torch 2.15 breaks the graph there instead
        assert version_of("torch") >= (2, 15) and report.graphs == 2
        return
    assert {row.name: row.reason for row in report.layers} == {
        "first.weight": "NOT_REACHED",
        "recurrent.weight_ih_l0": "RECURRENT",
        "recurrent.weight_hh_l0": "RECURRENT",
        "last.weight": "NOT_REACHED",
    }
    (place,) = report.graph_breaks
    assert "test_explain_mends.py" in place and "in forward: not compiled" in place
    assert "torch._dynamo.config.allow_rnn = True" in str(report) and "not compiled, but run by Python" in str(report)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        report = explain(model, x)
    assert {row.name: row.reason for row in report.layers} == {
        "first.weight": None,
        "last.weight": None,
        "recurrent.weight_ih_l0": "RECURRENT",
        "recurrent.weight_hh_l0": "RECURRENT",
    }
    assert report.graph_breaks == () and "allow_rnn" not in str(report)


def test_the_fast_path_of_an_encoder():
    """Of quantized weights: PyTorch's operator for the whole layer cannot take them, so that the function is left to Python."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval().requires_grad_(False)
    for name in ("linear1", "linear2"):
        module = model[0].layers[0].get_submodule(name)
        module.weight = nn.Parameter(IntScaleTensor.from_hp(module.weight.detach()), requires_grad=False)
    report, mended = explain(model, torch.randn(2, 3, 64)), None
    rows = {row.name.rpartition("0.")[2]: row for row in report.layers}
    if report.graphs == 0:
        assert rows["linear1.weight"].quantized and rows["linear1.weight"].kernel == "eager: in no graph"
        assert report.graph_breaks and "set_fastpath_enabled(False)" in str(report)
    torch.backends.mha.set_fastpath_enabled(False)
    torch._dynamo.reset()
    mended = explain(copy.deepcopy(model), torch.randn(2, 3, 64))
    rows = {row.name.rpartition("0.")[2]: row for row in mended.layers}
    assert rows["linear1.weight"].gemm and rows["linear2.weight"].gemm
    assert "set_fastpath_enabled" not in " ".join(mended.notes)
