"""For each reason of refusal a model that shows it, and a line in docs/reasons.md with the mend."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, explain
from intscale_compile.compile.binding import rewrite_graph
from intscale_compile.compile.options import parse_options
from intscale_compile.passes import PASSES, apply_passes
from intscale_compile.reasons import Reason, log_once
from tests.support.graphs import capture
from tests.support.reasons import MODELS, Holder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reasons.md"


ALONE = []  # a group of one rank, while there are ranks
# Collectives over a pretended group of four ranks; one over a group of one.
COLLECTIVES = {
    Reason.COLLECTIVE_REDUCE_OP: lambda x, w: fc.all_reduce(x, "avg", dist.group.WORLD),
    Reason.COLLECTIVE_DTYPE: lambda x, w: fc.all_reduce(x.long(), "sum", dist.group.WORLD),
    Reason.COLLECTIVE_ONE_RANK: lambda x, w: fc.all_reduce(x + 1, "sum", ALONE[0]),
    Reason.COLLECTIVE_TOO_SMALL: lambda x, w: fc.all_reduce(x[0] + 1, "sum", dist.group.WORLD),
    Reason.COLLECTIVE_BELOW_THRESHOLD: lambda x, w: fc.all_reduce(x[:2] + 1, "sum", dist.group.WORLD),
    Reason.COLLECTIVE_PLAIN: lambda x, w: fc.all_reduce(x + 1, "sum", dist.group.WORLD),
    Reason.COLLECTIVE_NO_LOSSLESS_FORM: lambda x, w: fc.all_gather_tensor(x + 1, 0, dist.group.WORLD) @ w.t(),
    Reason.COLLECTIVE_GATHERS_INPUT: lambda x, w: F.linear(
        x, fc.all_gather_tensor(w.bfloat16(), 0, dist.group.WORLD).float()
    ),
    Reason.COLLECTIVE_NOT_MULTIPLIED: lambda x, w: fc.all_gather_tensor(F.linear(x, w), 0, dist.group.WORLD),
    Reason.COLLECTIVE_FORM: lambda x, w: (
        torch.ops._c10d_functional.all_reduce(x, "sum", dist.group.WORLD.group_name) + 1
    ),
    Reason.PASS_DISABLED: lambda x, w: fc.all_reduce(x + 1, "sum", dist.group.WORLD),
}

# Not by explain: quantize_ says the first; the second needs a compiler that hands weights without data to the backend; explain
# has no backward graphs, and a graph over a group that is not there does not run; sharded weights need ranks.
ELSEWHERE = {
    Reason.ALREADY_QUANTIZED, Reason.FAKE_WEIGHT, Reason.COLLECTIVE_BACKWARD, Reason.COLLECTIVE_GROUP, Reason.SHARDED_FORM,
    Reason.SHARDED_PLAIN, Reason.STRIDES,
}  # fmt: skip


@pytest.mark.parametrize("reason", MODELS, ids=lambda reason: reason.name)
def test_explain_shows_the_reason_with_its_mend(reason):
    made = MODELS[reason]()
    given = made if isinstance(made, tuple) else (made,)
    model, options, x = (*given, *({}, torch.randn(4, 64))[len(given) - 1 :])
    report = explain(model, x, options=options)
    assert reason.name in {layer.reason for layer in report.layers}
    assert f"{reason.name}: {reason.value}" in str(report)
    assert reason.name in report.to_html() and report.to_dict()["layers"]


@pytest.fixture
def ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    ALONE[:] = [dist.new_group([0])]
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reason", COLLECTIVES, ids=lambda reason: reason.name)
def test_explain_shows_why_a_collective_stays_plain(ranks, reason):
    torch._dynamo.reset()
    options = {"intscale.communication": "int8", "intscale.communication_min_bytes": 1000}
    if reason is Reason.PASS_DISABLED:
        options["intscale.disable_passes"] = ["quantize_collectives"]
    if reason in (Reason.COLLECTIVE_PLAIN, Reason.COLLECTIVE_NO_LOSSLESS_FORM):
        options["intscale.communication"] = "auto"
    report = explain(Holder(COLLECTIVES[reason], torch.randn(32, 64)), torch.randn(16, 64), options=options)
    (one,) = report.collectives
    assert (one.reason, one.explanation) == (reason.name, reason.value) and not one.quantized
    assert f"{reason.name}: {reason.value}" in str(report) and reason.name in report.to_html()
    assert report.to_dict()["collectives"][0]["reason"] == reason.name


def _reports(graph):
    from intscale_compile.passes.quantize_collectives import QuantizeCollectives

    one = QuantizeCollectives("int8", 0)
    one(graph)
    return [report.reason for report in one.reports]


def _graph_with_a_sum(group, placeholder="x"):
    graph = fx.Graph()
    x = graph.placeholder(placeholder)
    x.meta["val"] = torch.empty(64, 64, device="cpu")
    total = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", group))
    graph.output(graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (total,)))
    return graph


def test_collective_backward(ranks):
    name = dist.group.WORLD.group_name
    assert _reports(_graph_with_a_sum(name, "tangents_1")) == [Reason.COLLECTIVE_BACKWARD.name]
    assert _reports(_graph_with_a_sum(name)) == [None]


def test_collective_group(ranks):
    assert _reports(_graph_with_a_sum("no such group")) == [Reason.COLLECTIVE_GROUP.name]


def _sharded(product, quantize):
    """A model whose weight the first of four ranks has a shard of."""
    mesh = init_device_mesh("cpu", (4,))
    model = Holder(lambda x, w: product(DTensor.from_local(x, mesh, [Replicate()]), w).to_local(), torch.randn(64, 64))
    if quantize:
        model.w0 = nn.Parameter(IntScaleTensor.from_hp(model.w0.detach()), requires_grad=False)
    model.w0 = nn.Parameter(distribute_tensor(model.w0, mesh, [Shard(0)], src_data_rank=None), requires_grad=False)
    torch._dynamo.reset()
    return explain(model, torch.randn(4, 64))


def test_sharded_form(ranks):
    report = _sharded(lambda x, w: x @ w.t(), quantize=True)
    assert [layer.reason for layer in report.layers] == ["SHARDED_FORM"] and Reason.SHARDED_FORM.value in str(report)
    assert _sharded(F.linear, quantize=True).gemms == 1  # the form that the pass knows


def test_sharded_plain(ranks):
    report = _sharded(F.linear, quantize=False)
    assert [layer.reason for layer in report.layers] == ["SHARDED_PLAIN"] and Reason.SHARDED_PLAIN.value in str(report)


def test_already_quantized(caplog):
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, IntScaleConfig())
    log_once.cache_clear()
    with caplog.at_level("INFO", logger="intscale_compile"):
        quantize_(model, IntScaleConfig())
    assert Reason.ALREADY_QUANTIZED.value in caplog.text


def test_fake_weight():
    found = []

    def backend(gm, example_inputs):
        mode = next(n.meta["example_value"].fake_mode for n in gm.graph.nodes if "example_value" in n.meta)
        fakes = [mode.from_tensor(value) for value in example_inputs]
        found.extend(c.reason for c in rewrite_graph(gm, fakes, parse_options(None, {})[0]).candidates)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(nn.Linear(64, 64).requires_grad_(False), backend=backend)(torch.randn(4, 64))
    assert found == [Reason.FAKE_WEIGHT]


def test_strides():
    """A product that Dynamo records with other strides than a new tensor has, and a result of the graph."""
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    rewrite = capture(lambda x: torch.matmul(x, weight), torch.randn(8, 64))
    (node,) = [n for n in rewrite.graph.nodes if n.target is torch.matmul]
    with rewrite.fake_mode:
        node.meta["example_value"] = torch.empty_strided((8, 64), (1, 8))
    apply_passes(rewrite, PASSES)
    assert [c.reason for c in rewrite.candidates] == [Reason.STRIDES]


def test_every_reason_has_a_model():
    assert set(MODELS) | set(COLLECTIVES) | ELSEWHERE == set(Reason)
    assert all(callable(globals()[f"test_{reason.name.lower()}"]) for reason in ELSEWHERE)


def test_the_page_lists_every_reason_in_its_own_words():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.M))
    assert list(rows) == [reason.name for reason in Reason]
    for reason in Reason:
        assert rows[reason.name] == reason.value, (
            f"docs/reasons.md: {reason.name} says something else than the compiler"
        )


def test_the_page_has_a_mend_for_every_reason():
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            assert len(line.split(" | ")[-1].removesuffix(" |")) > 10, line
