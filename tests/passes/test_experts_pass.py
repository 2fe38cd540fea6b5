"""The pass for experts: what it matches, what it emits, that it agrees with eager calls, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor, linears_and_experts
from intscale_compile.kernels.arguments import GroupedArguments, arguments_of
from intscale_compile.kernels.w4a8_grouped import GROUPED_OP
from intscale_compile.ops import quantize_per_token
from intscale_compile.passes import PASSES, apply_passes
from intscale_compile.reasons import Reason
from tests.support.compiled import rewritten as op_by_op
from tests.support.graphs import assert_true_metadata, capture, count, run
from tests.support.moe import experts_module, routing, sqnr

pytest.importorskip("transformers")
QUICK = IntScaleConfig(scale_search="absmax")
COMPILED = ("grouped_mm", "batched_mm")
ONE_OF_THEM = ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.slow)]  # the passes make one op of both
OTHER_DTYPES = (("grouped_mm", torch.bfloat16), ("batched_mm", torch.float32), ("intscale", torch.bfloat16))


def rewritten(model, *inputs, **options):
    rewrite = capture(model, *inputs, **{"intscale.config": QUICK, **options})
    apply_passes(rewrite, PASSES)
    return rewrite


def quantized(module):
    module = copy.deepcopy(module)
    quantize_(module, QUICK, filter_fn=linears_and_experts)
    return module


class Stack(nn.Module):
    """A product with a stack of 4 experts."""

    def __init__(self, function, *shape, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, dtype=dtype) * 0.1, requires_grad=False)
        self.function = function

    def forward(self, x, *index):
        return self.function(x, self.weight, *index)


@pytest.mark.parametrize(
    "kind, implementation",
    [
        *((kind, "grouped_mm") for kind in ("mixtral", "gpt_oss", "nemotron_h")),
        ("mixtral", "batched_mm"),
        *(pytest.param(kind, "batched_mm", marks=pytest.mark.slow) for kind in ("gpt_oss", "nemotron_h")),
    ],
)
def test_both_doors_of_every_layout(kind, implementation):
    module, inputs = experts_module(kind, implementation), routing(6)
    door = quantized(module)
    assert {type(p) for n, p in door.named_parameters() if "bias" not in n} == {IntScaleTensor}
    eager = door(*inputs)
    assert sqnr(module(*inputs), eager) > 12
    for one in (module, door):
        rewrite = rewritten(one, *inputs)
        assert count(rewrite, GROUPED_OP) == count(rewrite, quantize_per_token.OP) == rewrite.counts["experts"] == 2
        assert [c.reason for c in rewrite.candidates] == [None, None]
        assert_true_metadata(rewrite)
        (result,) = run(rewrite)
        torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", COMPILED)
def test_tokens_are_quantized_once_and_never_gathered(implementation):
    rewrite = rewritten(experts_module("mixtral", implementation), *routing(6))
    first, second = (node for node in rewrite.graph.nodes if node.target is quantize_per_token.OP)
    assert first.args[0].meta["example_value"].shape[0] == 6 and second.args[0].meta["example_value"].shape[0] == 12
    ops = [node for node in rewrite.graph.nodes if node.target is GROUPED_OP]
    assert arguments_of(GroupedArguments, ops[0]).row_index is not None
    sorts = count(rewrite, torch.sort)
    assert sorts == 1, "the ids of a layer are sorted once"
    assert not any("grouped_mm" in str(n.target) or n.target is torch.bmm for n in rewrite.graph.nodes)


def test_rows_written_after_the_gather_are_not_read_behind_it():
    def gathered(x, w, index, offsets):
        rows = x[index]
        rows.mul_(2.0)
        return torch._grouped_mm(rows, w.transpose(-2, -1), offs=offsets)

    def source(x, w, index, offsets):
        x = x * 1.0
        rows = x[index]
        x.mul_(3.0)
        return torch._grouped_mm(rows, w.transpose(-2, -1), offs=offsets) + x.sum()

    index, offsets = torch.tensor([2, 0, 1, 2]), torch.tensor([1, 1, 3, 4], dtype=torch.int32)
    for function in (gathered, source):
        module = Stack(function, 4, 32, 64, dtype=torch.bfloat16)
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        rewrite = rewritten(module, x, index, offsets)
        (op,) = (node for node in rewrite.graph.nodes if node.target is GROUPED_OP)
        assert arguments_of(GroupedArguments, op).row_index is None
        assert sqnr(module(x, index, offsets), run(rewrite)[0]) > 10


def test_second_run_changes_nothing():
    rewrite = rewritten(experts_module("mixtral", "batched_mm"), *routing(3))
    text, counts = str(rewrite.graph), dict(rewrite.counts)
    apply_passes(rewrite, PASSES)
    assert str(rewrite.graph) == text and rewrite.counts["experts"] == counts["experts"] == 2


def test_the_same_number_of_rows_for_every_expert():
    """Llama 4, in both dtypes of ids and with a symbolic number of rows."""
    module = Stack(lambda x, w: torch.bmm(x, w), 4, 64, 32)
    x = torch.randn(4, 3, 64)
    for dynamic in (None, True):
        rewrite = rewritten(module, x, dynamic=dynamic)
        assert count(rewrite, GROUPED_OP) == 1
        torch._dynamo.reset()
        if dynamic:
            assert sqnr(module(x), torch.compile(module, backend="intscale", dynamic=True, fullgraph=True)(x)) > 15
        else:
            assert sqnr(module(x), op_by_op(module)(x)) > 15
    door = copy.deepcopy(module)
    door.weight = nn.Parameter(
        IntScaleTensor.from_hp(module.weight.mT, IntScaleConfig()).transpose(1, 2), requires_grad=False
    )
    torch._dynamo.reset()
    torch.testing.assert_close(door(x), op_by_op(door)(x))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_selected_experts_in_both_operands(ids):
    chosen = torch.tensor([3, 0, 3, 1, 0], dtype=ids)
    left = Stack(lambda x, w, i: torch.bmm(w[i], x.unsqueeze(-1)), 4, 32, 64)
    right = Stack(lambda x, w, i: torch.bmm(x[:, None], w[i].transpose(1, 2)), 4, 32, 64)
    copied = Stack(lambda x, w, i: torch.bmm(x[:, None], w.index_select(0, i).mT), 4, 32, 64)
    x = torch.randn(5, 64)
    for module in (left, right, copied):
        rewrite = rewritten(module, x, chosen)
        assert count(rewrite, GROUPED_OP) == 1, rewrite.graph
        assert_true_metadata(rewrite)
        assert sqnr(module(x, chosen), run(rewrite)[0]) > 12


@pytest.mark.parametrize("implementation", ONE_OF_THEM)
def test_dynamic_tokens_on_one_graph(implementation):
    module = quantized(experts_module("mixtral", implementation))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="intscale", dynamic=True, fullgraph=True)
    for tokens in (3, 9, 40):
        inputs = routing(tokens)
        assert sqnr(module(*inputs), compiled(*inputs)) > 35


@pytest.mark.parametrize(
    "implementation, dtype",
    [
        pytest.param("grouped_mm", torch.float32, marks=pytest.mark.generated),
        *(("batched_mm", torch.bfloat16), ("intscale", torch.float32)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_DTYPES),
    ],
)
def test_compiled_equals_eager(implementation, dtype, request):
    module = quantized(experts_module("gpt_oss", implementation, dtype))
    inputs = routing(5, dtype=dtype)
    eager = module(*inputs)
    assert eager.dtype is dtype
    both = implementation == "intscale" or request.node.get_closest_marker("slow")
    for backend in ("intscale", "inductor") if both else ("intscale",):
        torch._dynamo.reset()
        with torch.no_grad():
            assert sqnr(eager, torch.compile(module, backend=backend, fullgraph=True)(*inputs)) > 35, backend


def test_weights_changed_in_place_are_seen():
    module, inputs = experts_module("mixtral", "grouped_mm"), routing(4)
    torch._dynamo.reset()
    compiled = op_by_op(module)
    first = compiled(*inputs)
    with torch.no_grad():
        module.down_proj.mul_(2.0)
    torch.testing.assert_close(compiled(*inputs), 2 * first, rtol=1e-4, atol=1e-4)


NEGATIVE = {
    Reason.EXCLUDED: ({"intscale.skip": ".*gate_up_proj|.*down_proj"}, {}),
    Reason.NOT_SELECTED: ({"intscale.quantize_plain": False}, {}),
    Reason.NON_FINITE: ({}, {"value": float("nan")}),
    Reason.REQUIRES_GRAD: ({}, {"grad": True}),
}


@pytest.mark.parametrize("reason", NEGATIVE, ids=lambda reason: reason.name)
def test_experts_left_alone(reason):
    options, change = NEGATIVE[reason]
    module, inputs = experts_module("mixtral", "grouped_mm"), routing(4)
    if "value" in change:
        module.gate_up_proj[1, 0, 0] = module.down_proj[1, 0, 0] = change["value"]
    module.requires_grad_("grad" in change)
    found = []

    def backend(gm, example_inputs):
        from intscale_compile.compile.binding import rewrite_graph
        from intscale_compile.compile.options import parse_options

        found.append(rewrite_graph(gm, example_inputs, parse_options(None, options)[0]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend)(*inputs)
    assert [c.reason for c in found[0].candidates] == [reason] * 2
    assert count(found[0], GROUPED_OP) == 0


def test_loop_over_experts_has_a_reason():
    module, inputs = experts_module("mixtral", "eager"), routing(4)
    report = intscale_compile.explain(module, *inputs)
    assert {layer.name: layer.reason for layer in report.layers} == {"gate_up_proj": "EXPERTS", "down_proj": "EXPERTS"}
    assert "set_experts_implementation" in str(report)


def test_explain_shows_stacks():
    report = intscale_compile.explain(experts_module("gpt_oss", "grouped_mm"), *routing(4))
    assert (report.gemms, report.activation_quantizations, len(report.fallbacks)) == (2, 2, 0)
    up = report.layers[0]
    assert (up.name, up.shape, up.experts, up.tokens) == ("gate_up_proj", (384, 128), 4, "8")
    assert up.kernel == "oneDNN grouped fold" and up.parameters == 4 * 384 * 128
    assert "4 x 384 x 128" in str(report) and report.quantized_fraction > 0.95


@pytest.mark.parametrize("implementation", ONE_OF_THEM)
def test_gradient_of_the_activation_passes_straight_through(implementation):
    module = quantized(experts_module("mixtral", implementation))
    dense = copy.deepcopy(module)
    for name, parameter in list(dense.named_parameters()):
        setattr(dense, name, nn.Parameter(parameter.dequantize(), requires_grad=False))
    x, index, weights = routing(5)
    grads = []
    torch._dynamo.reset()
    for one in (dense, module, torch.compile(module, backend="intscale", fullgraph=True)):
        x = x.detach().requires_grad_()
        one(x, index, weights).square().sum().backward()
        grads.append(x.grad)
    assert sqnr(grads[0], grads[1]) > 20 and sqnr(grads[1], grads[2]) > 35
