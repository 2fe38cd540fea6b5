"""Which form an all-reduce takes: plans from measured times and without them, and what compiled graphs and the operator do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from intscale_compile.communication.choice import BUILT_IN, Allowed, Plan, plan
from intscale_compile.communication.link_cost import thresholds
from intscale_compile.communication.link_table import Key, Link, read_table, write_table
from intscale_compile.communication.planned import PLANNED_ALL_REDUCE
from intscale_compile.communication.reference import simulate_lossless_all_reduce
from intscale_compile.compile.options import parse_options
from intscale_compile.errors import ConfigError
from intscale_compile.passes.quantize_collectives import QuantizeCollectives

LINK = Link("nccl", "some-gpu", 4)
KB, MB = 1 << 10, 1 << 20
TIMES = {
    Key("all_reduce", "plain"): {8 * KB: 14.0, 64 * KB: 17.0, MB: 26.0, 32 * MB: 180.0, 128 * MB: 610.0},
    Key("all_reduce", "one_shot"): {8 * KB: 5.0, 64 * KB: 6.0, MB: 25.0},
    Key("all_reduce", "two_shot"): {8 * KB: 8.0, 64 * KB: 8.0, MB: 13.0, 32 * MB: 178.0, 128 * MB: 660.0},
    Key("all_reduce", "int8"): {8 * KB: 9.0, 64 * KB: 9.0, MB: 13.2, 32 * MB: 100.0, 128 * MB: 400.0},
}


def test_measured_times_give_the_fastest_form_at_every_size():
    found = plan(LINK, TIMES, Allowed.parse("auto"))
    assert (
        str(found) == f"0:one_shot,{MB}:two_shot,{32 * MB}:plain" and found.source == "measured"
    )  # 1 % faster is noise
    assert [found.form(n) for n in (1, MB - 1, MB, 32 * MB, 1 << 40)] == ["one_shot"] * 2 + ["two_shot"] + ["plain"] * 2
    quantized = plan(LINK, TIMES, Allowed.parse("auto+int8"))
    assert str(quantized) == f"0:one_shot,{MB}:two_shot,{32 * MB}:int8", "lossless where quantizing is not 5 % faster"
    assert (
        str(plan(LINK, TIMES, Allowed.parse("auto+int8"), min_bytes=2 * MB))
        == f"0:one_shot,{MB}:two_shot,{2 * MB}:int8"
    )
    assert str(plan(LINK, TIMES, Allowed.parse("auto+int8"), min_bytes=0)) == "0:int8"
    assert str(plan(LINK, TIMES, Allowed.parse("int8"))) == "0:int8", "beside the plain one alone"


def test_without_cuda_graphs_the_host_decides():
    found = plan(LINK, TIMES, Allowed.parse("auto+int8"), graphs=False)
    assert str(found) == f"0:plain,{8 * MB}:two_shot,{32 * MB}:int8" and found.source == "no CUDA graphs"


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 72])
def test_without_measurement_the_number_of_ranks_decides(ranks):
    one_shot, two_shot, quantized = BUILT_IN[2 if ranks == 2 else 4 if ranks <= 4 else 16]
    found = plan(Link("nccl", "some-gpu", ranks), {}, Allowed.parse("auto"))
    assert found.steps == ((0, "one_shot"), (one_shot + 1, "two_shot"), (two_shot + 1, "plain"))
    found = plan(Link("nccl", "some-gpu", ranks), {}, Allowed.parse("auto+int4"))
    assert found.steps == ((0, "one_shot"), (one_shot + 1, "two_shot"), (quantized, "int4"))
    for link in (Link("gloo", "cpu", ranks), Link("nccl", "some-gpu", ranks, 2)):
        assert str(plan(link, {}, Allowed.parse("auto+int8"))) == "0:plain"


def test_texts_of_plans_and_of_what_is_allowed():
    for text in ("0:plain", "0:one_shot,4096:two_shot,65536:int4-spikes"):
        assert str(Plan.parse(text)) == text
    for text in ("", "5:plain", "0:plain,0:int8", "0:int3", "x:plain"):
        with pytest.raises(ConfigError):
            Plan.parse(text)
    assert [str(Allowed.parse(text)) for text in ("bf16", "auto", "auto+int8", "int6")] == [
        "auto",
        "auto",
        "auto+int8",
        "int6",
    ]
    assert parse_options(None, {"intscale.communication": "bf16"})[0].communication == "auto"
    for value in ("auto+", "auto+bf16", "bf16+int8", 8):
        with pytest.raises(ConfigError, match="intscale.communication"):
            parse_options(None, {"intscale.communication": value})


def test_a_table_holds_lossless_forms_of_an_all_reduce(tmp_path):
    write_table(tmp_path / "table.json", LINK, {}, TIMES)
    assert read_table(tmp_path / "table.json") == (LINK, TIMES)
    assert [key.wire for key in thresholds(LINK, TIMES)] == ["int8"], "they are no wire formats"
    write_table(tmp_path / "other.json", LINK, {}, {Key("all_gather", "one_shot"): {4096: 1.0}})
    with pytest.raises(ConfigError, match="one_shot"):
        read_table(tmp_path / "other.json")


def test_the_sum_is_rounded_once():
    ones = [torch.full((8,), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    assert (
        simulate_lossless_all_reduce(ones).tolist() == [260.0] * 8
    )  # 256 after additions in bf16: 256 + 1 rounds to 256
    assert torch.stack([ones[0] + one for one in ones[1:]]).eq(256).all()


@pytest.fixture
def group():
    """A group of four ranks of which only this one exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _replaced(tokens, wire, group, dtype=torch.bfloat16, ranks=4):
    """Target and arguments of the all-reduce of ``[tokens, 4096]`` on a GPU after the pass, and its report."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(tokens, 4096, device="meta", dtype=dtype)
    total = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", group.group_name))
    wait = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (total,))
    wait.meta["val"] = x.meta["val"]
    graph.output(wait)
    one = QuantizeCollectives(wire)
    one.links = {group.group_name: {"meta": (Link("nccl", "some-gpu", ranks), {})}}
    one(graph)
    node = list(graph.nodes)[1]
    return node.target, node.args[1:], one.reports[0]


def test_the_pass_takes_the_form_of_the_size(group):
    name = group.group_name
    for tokens, form in ((1, "one_shot"), (64, "two_shot")):
        target, args, report = _replaced(tokens, "auto", group)
        assert target is PLANNED_ALL_REDUCE and args == (f"0:{form}", name)
        assert report.decision == form and report.quantized and report.threshold_source == "built-in"
    target, args, report = _replaced(32768, "auto", group)  # 256 MB
    assert target is torch.ops._c10d_functional.all_reduce.default and report.reason == "COLLECTIVE_PLAIN"
    assert _replaced(8192, "auto+int8", group)[1] == ("0:int8", name)
    assert _replaced(1, "auto", group, torch.float32)[2].reason == "COLLECTIVE_PLAIN"


def test_what_cannot_run_here_is_the_plain_collective_with_a_reason(group, caplog):
    from intscale_compile.reasons import log_once

    log_once.cache_clear()
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with caplog.at_level("INFO", logger="intscale_compile"):
        for _ in range(2):
            found = PLANNED_ALL_REDUCE(x, "0:one_shot", group.group_name)
    assert found.shape == x.shape and found.data_ptr() != x.data_ptr()
    assert caplog.text.count("the tensor is on cpu") == 1
    assert fc.wait_tensor(fc.all_reduce(x, "sum", group)).shape == x.shape
