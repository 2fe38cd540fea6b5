"""Mixtures of experts: the op, eager products with stacks, quantizing, routers, and the transformers interface."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import FqnToConfig, quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor, linears_and_experts
from intscale_compile.errors import InputError, UnsupportedOpError
from intscale_compile.kernels import cpu_gemm
from intscale_compile.kernels.cpu_gemm import _unpacked
from intscale_compile.kernels.w4a8_grouped import GROUPED_OP, reference_grouped
from intscale_compile.ops import KERNEL_ABI
from intscale_compile.reasons import Reason, log_once
from intscale_compile.tensors.expert_layers import expert_stacks, router_linears
from intscale_compile.tensors.expert_operators import SelectedExperts
from intscale_compile.tensors.experts import batched_linear, grouped_linear
from tests.support.moe import experts_module, routing, sqnr

QUICK = IntScaleConfig(scale_search="absmax")
CONFIGS = [
    IntScaleConfig(scale_search="absmax", group_size=group, scale_bits=bits)
    for group, bits in ((32, 4), (64, 8), (128, 4), (256, 8), (-1, 4))
] + [IntScaleConfig(weight_bits=8), IntScaleConfig(amplifier=1024, scale_search="absmax")]


def stack(config=QUICK, packing="plain", experts=5, n=70, k=200) -> IntScaleTensor:
    weight = torch.randn(experts, n, k, generator=torch.Generator().manual_seed(0))
    return IntScaleTensor.from_hp(weight, config).to_packing(packing)


def operands(weight: IntScaleTensor, rows: int, gather: bool, scatter: bool):
    tokens = 9 if gather else rows
    xq = torch.randint(-127, 128, (tokens, weight.in_features), dtype=torch.int8)
    row_index = torch.randint(0, tokens, (rows,), dtype=torch.int32) if gather else None
    out_index = torch.randperm(rows) if scatter else None
    return xq, torch.rand(tokens, 1), row_index, out_index


def call(weight, xq, token_scale, offsets, bias=None, row_index=None, out_index=None, dtype=torch.float32, ste=None):
    parts = (weight.qdata, weight.scale, weight.per_tensor_scale)
    form = (weight.out_features, weight.group_size, weight.scale_bits, weight.packing_format)
    return GROUPED_OP(
        xq, token_scale, *parts, bias, offsets, *form, dtype, KERNEL_ABI, row_index, out_index, ste
    )  # fmt: skip


OFFSETS = torch.tensor([3, 3, 12, 18, 18], dtype=torch.int32)  # of 20 rows: two experts without, two rows of none


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"g{c.group_size}-w{c.weight_bits}-s{c.scale_bits}-{c.amplifier}"
)
def test_op_is_exact(config, packing):
    weight = stack(config, packing)
    for gather, scatter in ((False, False), (True, True)):
        xq, token_scale, row_index, out_index = operands(weight, 20, gather, scatter)
        y = call(weight, xq, token_scale, OFFSETS, None, row_index, out_index)
        form = (weight.out_features, weight.group_size, weight.packing_format)
        acc = reference_grouped(xq, weight.qdata, weight.scale, OFFSETS, *form, row_index, out_index)
        scales = torch.zeros(20, 70)
        for p in range(18):
            expert = int(torch.searchsorted(OFFSETS, p, right=True))
            o, t = p if out_index is None else out_index[p], p if row_index is None else row_index[p]
            scales[o] = token_scale[t] * weight.row_scale[expert].view(-1)
        torch.testing.assert_close(y, acc.float() * scales, rtol=2.0**-22, atol=0)
        again = call(weight, xq, token_scale, OFFSETS.long(), torch.ones(5, 70), row_index, out_index)
        last = torch.arange(20)[18:] if out_index is None else out_index[18:]
        assert not again[last].any() and not y[last].any()


def test_rows_do_not_depend_on_their_neighbours():
    weight = stack()
    xq, token_scale, *_ = operands(weight, 20, False, False)
    y = call(weight, xq, token_scale, OFFSETS)
    only = torch.tensor([0, 0, 9, 9, 9], dtype=torch.int32)
    assert torch.equal(call(weight, xq[3:12], token_scale[3:12], only), y[3:12])


def test_opcheck():
    weight = stack()
    xq, token_scale, row_index, out_index = operands(weight, 20, True, True)
    x, bias = torch.randn(9, 200, requires_grad=True), torch.randn(5, 70, requires_grad=True)
    form = (weight.out_features, weight.group_size, weight.scale_bits, weight.packing_format, torch.float32, KERNEL_ABI)
    parts = (xq, token_scale, weight.qdata, weight.scale, weight.per_tensor_scale)
    for tail in ((None, None, None), (row_index, out_index, None), (row_index, out_index, x)):
        if tail[0] is None:
            torch.library.opcheck(GROUPED_OP, (xq, *parts[1:], None, OFFSETS.clamp(max=9), *form, *tail))
        else:
            torch.library.opcheck(GROUPED_OP, (*parts, bias if tail[2] is not None else None, OFFSETS, *form, *tail))


def test_gradients_of_activation_and_bias():
    weight, offsets = stack(), OFFSETS
    _, _, row_index, out_index = operands(weight, 20, True, True)
    x, bias = torch.randn(9, 200, requires_grad=True), torch.randn(5, 70, requires_grad=True)
    y = grouped_linear(x, weight, offsets, bias, row_index, out_index)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense = weight.dequantize()
    wanted_x, wanted_bias = torch.zeros(9, 200), torch.zeros(5, 70)
    for p in range(18):
        expert = int(torch.searchsorted(offsets, p, right=True))
        wanted_x[row_index[p]] += grad[out_index[p]] @ dense[expert]
        wanted_bias[expert] += grad[out_index[p]]
    torch.testing.assert_close(x.grad, wanted_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, wanted_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(offsets=OFFSETS[:4]), r"offsets has shape \(4,\), expected \(5,\)"),
        (dict(offsets=OFFSETS.float()), "offsets is torch.float32"),
        (dict(xq=torch.zeros(2, 3, 200, dtype=torch.int8)), "xq has 3 dimensions"),
        (dict(xq=torch.zeros(20, 100, dtype=torch.int8)), "100 features"),
        (dict(bias=torch.zeros(70)), r"bias has shape \(70,\)"),
        (dict(row_index=torch.zeros(2, 2, dtype=torch.int32)), "row_index has shape"),
    ],
)
def test_bad_operands(change, message):
    weight = stack()
    xq, token_scale, *_ = operands(weight, 20, False, False)
    with pytest.raises(InputError, match=message):
        call(weight, **(dict(xq=xq, token_scale=token_scale, offsets=OFFSETS) | change))


def test_unpacked_experts_are_kept_and_freed(monkeypatch):
    monkeypatch.setattr(cpu_gemm, "accumulate_few", lambda *_: None)  # it unpacks nothing
    weight, before = stack(), len(_unpacked)
    xq, token_scale, *_ = operands(weight, 20, False, False)
    first = call(weight, xq, token_scale, OFFSETS)
    assert sorted(_unpacked[weight.qdata].matrices) == [0, 2, 3], "only experts that were called"
    weight.copy_(IntScaleTensor.from_hp(torch.randn(5, 70, 200), QUICK))
    assert not torch.equal(call(weight, xq, token_scale, OFFSETS), first)
    del weight
    assert len(_unpacked) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
def test_every_implementation_agrees(kind, dtype):
    pytest.importorskip("transformers")
    inputs = routing(6, dtype=dtype)
    results = {}
    for implementation in ("grouped_mm", "batched_mm", "eager", "intscale"):
        module = experts_module(kind, implementation, dtype)
        reference = module(*inputs)
        quantize_(module, QUICK, filter_fn=linears_and_experts)
        results[implementation] = module(*inputs)
        assert sqnr(reference, results[implementation]) > 12
    for name, value in results.items():
        assert value.dtype is dtype and sqnr(results["grouped_mm"], value) > 35, name


def test_plain_experts_run_under_our_implementation():
    pytest.importorskip("transformers")
    inputs = routing(6)
    ours, theirs = (experts_module("mixtral", name)(*inputs) for name in ("intscale", "grouped_mm"))
    assert torch.equal(ours, theirs)


def test_chosen_experts_are_not_copied():
    weight = stack()
    chosen = weight[torch.tensor([4, 0, 4])]
    assert isinstance(chosen, SelectedExperts) and chosen.stack.qdata is weight.qdata and chosen.shape == (3, 70, 200)
    dense = weight.dequantize()[torch.tensor([4, 0, 4])]
    assert torch.equal(chosen.dequantize(), dense)
    assert torch.equal(chosen.transpose(1, 2).dequantize(), dense.transpose(1, 2))
    assert isinstance(chosen.materialize(), IntScaleTensor)
    with pytest.raises(UnsupportedOpError, match="materialize"):
        chosen + 1
    x = torch.randn(3, 200)
    y = torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(y, torch.cat([F.linear(x[i : i + 1], weight[e]) for i, e in enumerate((4, 0, 4))]))
    assert torch.equal(torch.bmm(x.unsqueeze(1), chosen.transpose(1, 2)).squeeze(1), y)


def test_batched_products_of_several_rows():
    weight, x = stack(), torch.randn(5, 3, 200)
    wanted = torch.stack([F.linear(x[e], weight[e]) for e in range(5)])
    assert torch.equal(torch.bmm(x, weight.transpose(1, 2)), wanted)
    assert torch.equal(torch.bmm(weight, x.transpose(1, 2)), wanted.transpose(1, 2))
    ids = torch.tensor([1, 1, 4, 0, 2])
    wanted = torch.stack([F.linear(x[i], weight[e]) for i, e in enumerate(ids.tolist())])
    assert torch.equal(batched_linear(x, weight, ids), wanted)


@pytest.mark.parametrize(
    "name, product",
    {
        "not transposed": lambda w, x: F.grouped_mm(x, w, offs=OFFSETS),
        "bias": lambda w, x: F.grouped_mm(x, w.transpose(1, 2), offs=OFFSETS, bias=torch.zeros(5, 70)),
        "left": lambda w, x: torch._grouped_mm(w, x, offs=OFFSETS),
        "no offsets": lambda w, x: F.grouped_mm(x, w.transpose(1, 2)),
        "both": lambda w, x: torch.bmm(w, w.transpose(1, 2)),
        "output dimension": lambda w, x: torch.bmm(torch.randn(5, 2, 70), w),
        "out": lambda w, x: torch.bmm(torch.randn(5, 2, 200), w.transpose(1, 2), out=torch.empty(5, 2, 70)),
    }.items(),
)
def test_refused_products_name_the_mend(name, product):
    with pytest.raises(UnsupportedOpError, match=";"):
        product(stack(), torch.randn(20, 200))


def test_grouped_mm_gives_zeros_to_rows_of_no_expert():
    weight, x = stack(), torch.randn(20, 200)
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=OFFSETS)
    assert torch.equal(y, torch._grouped_mm(x, weight.transpose(1, 2), OFFSETS)) and not y[18:].any()
    assert torch.equal(y[3:12], F.linear(x[3:12], weight[2]))


# --- quantizing -------------------------------------------------------------------------------------------------------


def test_stack_is_the_experts_one_by_one():
    dense = torch.randn(3, 70, 200)
    for config in CONFIGS:
        whole = IntScaleTensor.from_hp(dense, config)
        parts = [IntScaleTensor.from_hp(one, config) for one in dense]
        assert torch.equal(whole.qdata, torch.stack([p.qdata for p in parts]))
        assert torch.equal(whole.scale, torch.stack([p.scale for p in parts]))
        assert torch.equal(whole.row_scale, torch.stack([p.row_scale for p in parts]))
        assert whole.scale_bits == max(p.scale_bits for p in parts)
        assert torch.equal(whole.accumulator_bound(), torch.stack([p.accumulator_bound() for p in parts]))


def tiny_model(kind: str):
    """A random model of one layer: Mixtral, Qwen, or gpt-oss."""
    transformers = pytest.importorskip("transformers")
    shared = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    shared |= dict(num_experts_per_tok=2, use_cache=False, pad_token_id=0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**shared, intermediate_size=96, num_local_experts=4)
    elif kind == "gpt_oss":
        shared |= dict(head_dim=16, intermediate_size=96, num_local_experts=4, layer_types=["full_attention"])
        config = transformers.GptOssConfig(**shared)
    else:
        shared |= dict(intermediate_size=96, moe_intermediate_size=48, num_experts=32, decoder_sparse_step=1)
        shared |= dict(shared_expert_intermediate_size=96) if kind == "qwen2_moe" else dict(head_dim=16)
        config = {"qwen2_moe": transformers.Qwen2MoeConfig, "qwen3_moe": transformers.Qwen3MoeConfig}[kind](**shared)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "kind", ["mixtral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt_oss", "qwen2_moe", "qwen3_moe"))]
)
def test_small_models_with_every_linear_and_expert(kind):
    model, ids = tiny_model(kind), torch.arange(24).view(2, 12)
    plain_report = intscale_compile.explain(model, ids, options={"intscale.config": QUICK})
    assert "EXPERTS" not in {layer.reason for layer in plain_report.layers}
    quantize_(model, QUICK, filter_fn=linears_and_experts)
    stacks = [p for p in model.parameters() if p.dim() == 3]
    assert len(stacks) == 2 and all(isinstance(p, IntScaleTensor) for p in stacks)
    assert not any(isinstance(p, IntScaleTensor) for n, p in model.named_parameters() if "gate.weight" in n)
    eager, kept = model(ids).logits, []
    hook = model.register_forward_hook(lambda module, args, result: kept.append(result.logits))
    report = intscale_compile.explain(model, ids)
    hook.remove()
    allowed = {"ROUTER", "OUTPUT_EMBEDDING", "NOT_SELECTED", "TOO_SMALL", "TIED_EMBEDDING"}
    assert {layer.reason for layer in report.fallbacks} <= allowed
    assert sum(layer.experts is not None and layer.quantized for layer in report.layers) == 2
    assert report.graphs == 1 and sqnr(eager, kept[-1]) > 30  # the rewritten graph


@pytest.mark.parametrize("pattern", [r"re:.*\.experts\.(gate_up_proj|down_proj)", r"re:.*\.experts"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_fqn_patterns_reach_stacks_in_both_layouts(kind, pattern):
    by_name, by_filter = tiny_model(kind), tiny_model(kind)
    quantize_(by_name, FqnToConfig({pattern: QUICK}), filter_fn=None)
    quantize_(by_filter, QUICK, filter_fn=linears_and_experts)
    experts = {n: p for n, p in by_name.named_parameters() if isinstance(p, IntScaleTensor)}
    assert len(experts) == 2
    for name, parameter in experts.items():
        other = by_filter.get_parameter(name)
        assert parameter.transposed == other.transposed == (kind == "gpt_oss")
        assert torch.equal(parameter.qdata, other.qdata)


def test_default_filter_says_once_how_to_include_experts(caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        quantize_(tiny_model("mixtral"), QUICK)
        quantize_(tiny_model("mixtral"), QUICK)
    (record,) = [r for r in caplog.records if "stacks of expert weights" in r.message]
    assert "filter_fn=intscale_compile.linears_and_experts" in record.message and "2 stacks" in record.message


class GatedMixture(nn.Module):
    """A layer that routes by a linear layer named ``gate`` beside ``experts``."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 32, bias=False)
        self.experts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        return sum(share[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


@pytest.mark.parametrize("root", [False, True])
def test_linear_routers_stay_in_high_precision(root):
    model = GatedMixture() if root else nn.Sequential(GatedMixture())
    gate, name = (model.gate, "gate.weight") if root else (model[0].gate, "0.gate.weight")
    assert router_linears(model) == {id(gate)}
    report = intscale_compile.explain(model, torch.randn(3, 64))
    assert {layer.name: layer.reason for layer in report.layers}[name] == Reason.ROUTER.name
    quantize_(model, QUICK, filter_fn=linears_and_experts)
    assert [isinstance(p, IntScaleTensor) for p in model.parameters()] == [False, True, True]


def test_what_counts_as_a_stack():
    assert expert_stacks(nn.Conv1d(32, 32, 16)) == {} == expert_stacks(nn.Linear(32, 32))

    class Llama4Like(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 4
            self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 192))
            self.down_proj = nn.Parameter(torch.randn(4, 96, 64))

    assert expert_stacks(Llama4Like()) == {"gate_up_proj": True, "down_proj": True}


def test_failed_call_leaves_stacks_as_they_were():
    model = tiny_model("mixtral")
    before = {name: copy.deepcopy(p) for name, p in model.named_parameters()}
    experts = model.model.layers[0].mlp.experts
    experts.down_proj[1, 2, 3] = float("inf")
    with pytest.raises(intscale_compile.errors.WeightError, match=r"experts.down_proj has NaN or Inf"):
        quantize_(model, QUICK, filter_fn=linears_and_experts)
    assert not any(isinstance(p, IntScaleTensor) for p in model.parameters()) and len(before) > 0


@pytest.mark.slow  # in the other order: tests/test_api.py
def test_registration_where_transformers_was_imported_before():
    pytest.importorskip("transformers")
    script = """
import transformers, intscale_compile
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "intscale" in ALL_EXPERTS_FUNCTIONS
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
