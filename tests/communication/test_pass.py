"""The pass over collectives: what it replaces, what it leaves, and that every rank gets the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from intscale_compile import explain
from intscale_compile.communication.link_table import Key, link_of, table_path, times_of, write_table
from intscale_compile.compile.options import parse_options
from intscale_compile.debug import last_compilation
from intscale_compile.errors import ConfigError
from intscale_compile.passes.quantize_collectives import Chain, QuantizeCollectives
from intscale_compile.reasons import log_once
from tests.support.ranks import run_ranks

SCRIPT = Path(__file__).with_name("_pass_main.py")
INT8 = {"intscale.communication": "int8", "intscale.communication_min_bytes": 0}


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A group of four ranks of which only this one exists."""
    monkeypatch.setenv("INTSCALE_LINKS", str(tmp_path / "links"))
    torch._dynamo.reset()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.group.WORLD
    dist.destroy_process_group()
    torch._dynamo.reset()


def inner(n, k):
    return nn.Linear(k, n).requires_grad_(False)


class Reduced(nn.Module):
    """A product whose result is summed over the ranks."""

    def __init__(self):
        super().__init__()
        self.proj = inner(64, 128)

    def forward(self, x):
        return fc.all_reduce(self.proj(x), "sum", dist.group.WORLD)


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# --- several ranks ----------------------------------------------------------------------------------------------------


WIRES = {2: ("int8", 0.01), 3: ("int4", 0.15)}  # by ranks, with the largest relative error


def test_every_form_is_replaced_and_every_rank_agrees(tmp_path, monkeypatch):
    """Groups of two and of three ranks among three processes."""
    monkeypatch.setenv("INTSCALE_LINKS", str(tmp_path / "links"))
    results = run_ranks(SCRIPT, 3, tmp_path / "run", *(wire for wire, _ in WIRES.values()))
    for ranks, (wire, most) in WIRES.items():
        members = [result[ranks] for result in results[:ranks]]
        for result in members:
            _check_forms(result, ranks, wire, most)
        for i in (0, 1, 2, 4, 5):  # all but the scattered one
            assert all(torch.equal(members[0]["quantized"][i], other["quantized"][i]) for other in members[1:])
    _check_by_size([result[2] for result in results[:2]])
    _check_tuned([result[2] for result in results[:2]], tmp_path / "links")


def _check_forms(result, ranks, wire, most):
    assert result["counts"]["quantize_collectives"] == 5
    decisions = [(one.kind, one.decision, one.ranks) for one in result["collectives"]]
    assert decisions.count(("all_reduce", wire, ranks)) == 3
    assert decisions.count(("reduce_scatter", wire, ranks)) == 1
    assert sorted(d for k, d, _ in decisions if k == "all_gather") == ["COLLECTIVE_NOT_MULTIPLIED", wire]
    names = ["functional", "raw", "dtensor", "scattered", "gathered"]
    for name, found, plain in zip(names, result["quantized"], result["plain"]):
        assert found.dtype == plain.dtype and found.shape == plain.shape
        assert 0 < error(found, plain) <= most, f"{name} over {ranks} ranks"
    assert torch.equal(result["quantized"][5], result["plain"][5]), "logits are gathered as they are"


def _check_by_size(results):
    for result in results:
        graphs, found = result["by_size"]
        assert graphs == 1, "one graph for all numbers of tokens"
        assert [torch.equal(got, plain) for _, got, plain in found] == [True, False, False]
        assert all(error(got, plain) <= 0.01 for _, got, plain in found)


def _check_tuned(results, folder):
    first, second = (result["tuned"] for result in results)
    assert first == second, "ranks that know different times would decide differently"
    keys = {Key(op, form) for op in ("all_reduce", "all_gather") for form in ("plain", "int8")}
    assert first.keys() == keys and all(set(times) == {4096, 65536} for times in first.values())
    (table,) = folder.iterdir()
    assert table.name == "gloo-cpu-2x1.json"


# --- one rank of a pretended group -------------------------------------------------------------------------------------


@pytest.mark.generated
def test_off_unless_asked_for(group):
    model, x = Reduced(), torch.randn(4, 128)
    seen = []
    # A graph from Inductor's cache has no passes run over it.
    options = {"post_grad_custom_pre_pass": Users(seen), "fx_graph_cache": False}
    torch.compile(model, backend="intscale", options=options)(x)
    assert "_c10d_functional.all_reduce.default" in seen
    found = last_compilation()[-1]
    assert found.collectives == () and "quantize_collectives" not in found.pass_counts
    assert type(found.inductor_options["post_grad_custom_pre_pass"]) is Users
    report = explain(model, x)
    assert report.collectives == () and "collective" not in str(report)


class Users(CustomGraphPass):
    """A pass of the user: notes the operators that it sees."""

    def __init__(self, seen, key="users"):
        self.seen, self.key = seen, key

    def uuid(self):
        return self.key

    def __call__(self, graph):
        self.seen.extend(str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("where", ["option", "config"])
def test_the_users_own_pass_runs_before_ours(group, where):
    seen = []
    options = {**INT8, "fx_graph_cache": False}
    if where == "option":
        options["post_grad_custom_pre_pass"] = Users(seen)
    with torch._inductor.config.patch(post_grad_custom_pre_pass=None if where == "option" else Users(seen)):
        torch.compile(Reduced(), backend="intscale", options=options)(torch.randn(4, 128))
    assert "_c10d_functional.all_reduce.default" in seen
    assert last_compilation()[-1].pass_counts["quantize_collectives"] == 1


def test_a_chain_of_passes_is_cached_if_both_can_be(group):
    ours, calls = QuantizeCollectives("int8"), []
    assert Chain(Users([]), ours).uuid() == ("users", ours.uuid())
    assert Chain(Users([]), ours).uuid() != Chain(Users([], "others"), ours).uuid()
    assert Chain(lambda graph: None, ours).uuid() is None and Chain(Users([], None), ours).uuid() is None
    Chain(lambda graph: calls.append(graph), ours)(torch.fx.Graph())
    assert len(calls) == 1 and ours.ran


def test_cached_graphs_differ_by_option(group):
    """In one process with Inductor's cache on: every option has its own entry, and a hit still says how many there are."""
    model, x = Reduced(), torch.randn(4, 128)

    def compiled(options):
        torch._dynamo.reset()
        torch.compile(model, backend="intscale", options={"fx_graph_cache": True, **options})(x)
        found = last_compilation()[-1]
        return found, "".join(kernel.code for kernel in found.kernels)

    with fresh_cache():
        found, code = compiled(INT8)
        assert "quantized_all_reduce.default(buf" in code and "'int8'" in code and len(found.collectives) == 1
        for options, words in (
            ({**INT8, "intscale.communication": "int4-spikes"}, "'int4-spikes'"),
            ({**INT8, "intscale.communication_min_bytes": 1 << 20}, "_c10d_functional.all_reduce"),
            ({**INT8, "intscale.disable_passes": ["quantize_collectives"]}, "_c10d_functional.all_reduce"),
        ):
            found, code = compiled(options)
            assert words in code and len(found.collectives) == 1, "the pass ran: no entry of another option was taken"
        again, _ = compiled(INT8)
        assert again.collectives is None and again.pass_counts["quantize_collectives"] == 1
        assert "collectives: 1 quantized; Inductor had the graph in its cache" in str(again)


def test_uuid_holds_everything_that_decides(group):
    kinds = [
        QuantizeCollectives("int8"),
        QuantizeCollectives("int4"),
        QuantizeCollectives("int8", 0),
        QuantizeCollectives("int8", disabled=True),
    ]
    uuids = {one.uuid() for one in kinds}
    assert len(uuids) == 4 and QuantizeCollectives("int8").uuid() in uuids
    measure(group, {4096: 20.0}, {4096: 10.0})
    uuids.add(QuantizeCollectives("int8").uuid())
    assert len(uuids) == 5, "a measured link"
    dist.new_group([0])
    assert QuantizeCollectives("int8").uuid() not in uuids, "other groups"


def test_calls_are_counted_in_generated_code(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("buf1 = torch.ops.intscale.quantized_all_reduce.default(buf0, 'int8', '0')\n" * 2)
    assert QuantizeCollectives.calls_in([str(file)]) == 2 and QuantizeCollectives.calls_in([]) == 0


def test_coalesced_collectives_are_replaced_all_or_none(group):
    def both(x):
        first, second = fc.all_reduce_coalesced([x * 2, x[:2] * 3], "sum", dist.group.WORLD)
        gathered = fc.all_gather_into_tensor_coalesced([x * 2, x * 3], dist.group.WORLD)
        scattered = fc.reduce_scatter_tensor_coalesced([x * 4, x * 5], "sum", [0, 0], dist.group.WORLD)
        return first, second, [y @ x.t() for y in gathered], scattered

    class Both(nn.Module):
        forward = staticmethod(both)

    report = explain(Both(), torch.randn(4, 128), options=INT8)
    assert [one.decision for one in report.collectives] == ["int8"] * 6
    found = explain(Both(), torch.randn(4, 128), options={**INT8, "intscale.communication_min_bytes": 1500})
    reduced = [one for one in found.collectives if one.kind == "all_reduce"]
    assert [one.nbytes for one in reduced] == [2048, 1024]
    assert {one.reason for one in reduced} == {"COLLECTIVE_BELOW_THRESHOLD"}, "one of two is too small: neither"


def test_sizes_and_thresholds_in_the_report(group, tmp_path):
    model, x = Reduced(), torch.randn(16, 128)

    def only(**options):
        return explain(model, x, options={"intscale.communication": "int8", **options}).collectives[0]

    one = only()
    assert (one.name, one.kind, one.ranks, one.group) == ("all_reduce", "all_reduce", 4, group.group_name)
    assert (one.nbytes, one.threshold, one.threshold_source) == (16 * 64 * 4, 32 << 20, "built-in")
    assert one.reason == "COLLECTIVE_BELOW_THRESHOLD" and one.predicted_gain is None
    for least, wanted in ((4096, "int8"), (4097, "COLLECTIVE_BELOW_THRESHOLD")):
        one = only(**{"intscale.communication_min_bytes": least})
        assert (one.decision, one.threshold, one.threshold_source) == (wanted, least, "option")
    measure(group, {1024: 10.0, 4096: 20.0, 16384: 60.0}, {1024: 12.0, 4096: 10.0, 16384: 20.0})
    one = only()
    assert (one.decision, one.threshold, one.threshold_source) == ("int8", 4096, "measured")
    assert one.predicted_gain == pytest.approx(2.0)
    one = only(**{"intscale.communication": "int4"})
    assert one.threshold_source == "fitted" and one.predicted_gain > 1


def measure(group, plain, quantized):
    """Pretend that the link was measured."""
    link = link_of(group, torch.device("cpu"))
    times = {Key("all_reduce", "plain"): plain, Key("all_reduce", "int8"): quantized}
    write_table(table_path(link), link, {}, times)
    os.utime(table_path(link))
    assert times_of(link) == times


def test_symbolic_sizes_are_decided_at_each_call(group):
    report = explain(Reduced(), torch.randn(16, 128), options=INT8, dynamic=True)
    (one,) = report.collectives
    assert one.quantized and one.nbytes is None and one.decision == "int8 by size" and "by call" in str(report)


def test_a_table_that_never_pays_leaves_symbolic_sizes_plain(group):
    measure(group, {4096: 10.0, 1 << 20: 100.0}, {4096: 20.0, 1 << 20: 200.0})
    report = explain(Reduced(), torch.randn(16, 128), options={"intscale.communication": "int8"}, dynamic=True)
    assert report.collectives[0].reason == "COLLECTIVE_BELOW_THRESHOLD" and " never " in str(report)


def test_a_gather_is_quantized_only_on_its_way_into_a_product(group):
    class Gathers(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = inner(128, 512), inner(64, 128)

        def forward(self, x):
            whole = fc.all_gather_tensor(torch.nn.functional.rms_norm(x, [128]), 0, dist.group.WORLD)
            hidden = self.up(whole.view(-1, 512))  # through views
            logits = fc.all_gather_tensor(self.head(hidden), 0, dist.group.WORLD)
            best = logits.argmax(-1)
            return logits.float(), best, torch.nn.functional.one_hot(best, 64).float() @ self.head.weight

    report = explain(Gathers(), torch.randn(4, 128), options=INT8)
    assert [one.decision for one in report.collectives] == ["int8", "COLLECTIVE_NOT_MULTIPLIED"]


@pytest.mark.parametrize("value", [-1, 1.5, "1MB", True])
def test_bad_thresholds(value):
    with pytest.raises(ConfigError, match="communication_min_bytes.*number of bytes"):
        parse_options(None, {"intscale.communication_min_bytes": value})


def test_misspelt_options_get_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'intscale.communication'"):
        parse_options(None, {"intscale.comunication": "int8"})
    with pytest.raises(ConfigError, match="did you mean 'intscale.communication_min_bytes'"):
        parse_options(None, {"intscale.communication_minbytes": 0})
    with pytest.raises(ConfigError, match="did you mean 'quantize_collectives'"):
        parse_options(None, {"intscale.disable_passes": ["quantise_collectives"]})


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = inner(128, 128), Reduced128()

    def forward(self, x):
        return self.out(self.proj(x))


class Reduced128(nn.Module):
    def forward(self, x):
        return fc.all_reduce(x, "sum", dist.group.WORLD)


def test_collectives_of_repeated_layers_share_a_line(group):
    report = explain(nn.Sequential(*(Layer() for _ in range(4))), torch.randn(4, 128), options=INT8)
    assert [one.name for one in report.collectives][:2] == ["0.out.all_reduce", "1.out.all_reduce_1"]
    lines = [line.split() for line in str(report).splitlines() if "all_reduce" in line]
    assert [line[:3] for line in lines] == [["0..3.out.all_reduce", "4", "all_reduce"]]
    assert sum("all_reduce" in line for line in report.table(fold=False).splitlines()) == 4
    assert "0..3.out.all_reduce" in report.to_html()


def test_the_page_and_the_debug_output_show_collectives(group, tmp_path, monkeypatch):
    monkeypatch.setenv("INTSCALE_DEBUG", "2")
    monkeypatch.setenv("INTSCALE_DEBUG_DIR", str(tmp_path))
    torch.compile(Reduced(), backend="intscale", options={**INT8, "fx_graph_cache": False})(torch.randn(4, 128))
    text = (next(tmp_path.glob("graph_*")) / "passes.txt").read_text()
    assert "quantize_collectives" in text and "all_reduce over 4 ranks, 1,024 bytes: int8" in text
    assert "all_reduce over 4 ranks, 1,024 bytes: int8" in (tmp_path / "summary.txt").read_text()
    report = explain(Reduced(), torch.randn(4, 128), options=INT8)
    assert report.pass_counts["quantize_collectives"] == 1 and "1 of 1 collectives quantized (int8)" in str(report)
    assert report.to_dict()["collectives"][0]["wire"] == "int8" and 'id="collectives"' in report.to_html()


def test_gradients_stay_plain(group, caplog):
    """A training graph: the sum of the forward graph is quantized, that of the backward graph is not."""
    model, x = nn.Linear(128, 64), torch.randn(16, 128, requires_grad=True)

    def step(x):
        return fc.reduce_scatter_tensor_autograd(model(x), "sum", 0, dist.group.WORLD)

    options = {**INT8, "fx_graph_cache": False, "intscale.quantize_plain": False}
    log_once.cache_clear()
    with caplog.at_level("INFO", logger="intscale_compile"):
        torch.compile(step, backend="intscale", options=options)(x).sum().backward()
    assert last_compilation()[-1].collectives[0].decision == "int8"
    assert "COLLECTIVE_BACKWARD" in caplog.text
