"""The cost model of a link, its thresholds, and the tables that hold measured times."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from intscale_compile.communication import tune_link
from intscale_compile.communication.link_cost import (
    NEVER,
    Threshold,
    fit,
    plain_bytes,
    predicted_gain,
    threshold,
    wire_bytes,
)
from intscale_compile.communication.link_table import (
    PLAIN,
    Key,
    Link,
    link_of,
    read_table,
    table_path,
    times_of,
    write_table,
)
from intscale_compile.communication.link_tuning import main
from intscale_compile.errors import CommunicationError, ConfigError

LINK = Link("gloo", "cpu", 2)
SIZES = [1 << power for power in range(16, 29)]


def model_times(wires, op="all_reduce", ranks=4, alpha_plain=20.0, beta_plain=8e-3, alpha=60.0, beta=7e-3, gamma=1e-3):
    times = {Key(op, "plain"): {n: alpha_plain + beta_plain * plain_bytes(op, ranks, n) for n in SIZES}}
    for wire in wires:
        times[Key(op, wire)] = {n: alpha + beta * wire_bytes(op, ranks, n, wire) + gamma * n for n in SIZES}
    return times


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "all_gather"])
def test_the_fit_finds_the_constants_again(op):
    found = fit(op, 4, model_times(["int8", "int4"], op))
    assert found.alpha_plain == pytest.approx(20.0) and found.beta_plain == pytest.approx(8e-3)
    assert found.alpha == pytest.approx(60.0) and found.beta == pytest.approx(7e-3)
    assert found.gamma == pytest.approx(1e-3, rel=1e-3)


def test_the_fit_has_no_negative_constants():
    """Sizes alone cannot tell the quantization of one format from its transport; noise must not make one of them negative."""
    times = model_times(["int8"], alpha=0.0, gamma=0.0)
    times[Key("all_reduce", "int8")] = {
        n: us * (1.1 if n < 1 << 20 else 0.9) for n, us in times[Key("all_reduce", "int8")].items()
    }
    found = fit("all_reduce", 4, times)
    assert min(found.alpha, found.beta, found.gamma) >= 0 and found.quantized_us(1 << 24, "int8") > 0
    assert fit("all_reduce", 4, {}) is None and fit("all_gather", 4, times) is None


def test_bytes_on_the_wire():
    """Two ranks, 1024 elements of bf16, groups of 128: four groups a slice, each with a scale and a minimum in bf16."""
    assert plain_bytes("all_reduce", 2, 2048) == 2048 and plain_bytes("all_gather", 2, 2048) == 1024
    leg8, leg6, leg4 = 512 + 4 * 4, 384 + 4 * 4, 256 + 4 * 4
    assert wire_bytes("all_reduce", 2, 2048, "int8") == 2 * leg8
    assert wire_bytes("all_reduce", 2, 2048, "int6") == 2 * leg6 and wire_bytes("all_gather", 2, 2048, "int4") == leg4
    assert wire_bytes("reduce_scatter", 2, 2048, "int6") == wire_bytes("all_gather", 2, 2048, "int6") == leg6


def test_threshold_is_the_size_from_which_on_all_are_faster():
    plain = {1: 10.0, 2: 10.0, 4: 10.0, 8: 10.0}
    for us, wanted in (
        ((20, 5, 20, 5), 8),  # one slower size in between
        ((5, 5, 5, 5), 1),
        ((5, 5, 5, 9.9), NEVER),  # not faster by the margin at the largest
        ((20, 20, 20, 20), NEVER),
    ):
        times = {Key("all_reduce", "plain"): plain, Key("all_reduce", "int8"): dict(zip(plain, map(float, us)))}
        assert threshold(LINK, times, "all_reduce", "int8").nbytes == wanted


def test_formats_that_were_not_measured_go_by_the_model():
    link = Link("nccl", "x", 4)
    times = model_times(["int8", "int4"])
    measured = threshold(link, times, "all_reduce", "int4")
    fitted = threshold(link, {k: v for k, v in times.items() if k.wire != "int5"}, "all_reduce", "int5")
    assert fitted.source == "fitted" and measured.nbytes <= fitted.nbytes < NEVER
    assert predicted_gain(link, times, "all_reduce", "int5", 1 << 26) > 1
    between = predicted_gain(link, times, "all_reduce", "int8", (1 << 24) + 12345)
    gains = [predicted_gain(link, times, "all_reduce", "int8", n) for n in (1 << 24, 1 << 25)]
    assert min(gains) <= between <= max(gains)


def test_without_measurement_thresholds_are_built_in_and_no_gain_is_predicted():
    for link, least in (
        (LINK, NEVER),
        (Link("gloo", "cpu", 4, 2), 8 << 20),
        (Link("nccl", "h200", 2), 8 << 20),
        (Link("nccl", "h200", 16, 2), 8 << 20),
        (Link("mpi", "cpu", 2), 32 << 20),
    ):
        found = threshold(link, {}, "all_reduce", "int8")
        assert (found.nbytes, found.source) == (least, "built-in")
        assert predicted_gain(link, {}, "all_reduce", "int8", 1 << 26) is None
    assert str(threshold(LINK, {}, "all_reduce", "int8")) == "never (built-in)"


def test_without_cuda_graphs_small_messages_of_gpus_stay_plain():
    """The host launches them, and needs longer for ours than the GPU gains."""
    times = {
        Key("all_reduce", PLAIN): {1 << 16: 15.0, 1 << 25: 144.0},
        Key("all_reduce", "int8"): {1 << 16: 8.6, 1 << 25: 78.0},
    }
    for backend, device in (("nccl", "h200"), ("gloo", "cpu")):
        link = Link(backend, device, 2)
        assert threshold(link, times, "all_reduce", "int8", graphs=True) == Threshold(1 << 16, "measured")
        slow = threshold(link, times, "all_reduce", "int8", graphs=False)
        assert slow == (Threshold(8 << 20, "no CUDA graphs") if backend == "nccl" else Threshold(1 << 16, "measured"))
    never = {Key("all_reduce", PLAIN): {1 << 25: 70.0}, Key("all_reduce", "int8"): {1 << 25: 78.0}}
    assert threshold(Link("nccl", "h200", 2), never, "all_reduce", "int8", graphs=False) == Threshold(NEVER, "measured")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INTSCALE_LINKS", str(tmp_path))
    return tmp_path


def test_tables_are_merged_and_read_again_when_they_change(folder):
    assert times_of(LINK) == {}
    plain, int8 = Key("all_reduce", "plain"), Key("all_reduce", "int8")
    write_table(table_path(LINK), LINK, {"torch": "2"}, {plain: {1024: 5.0, 2048: 6.0}})
    assert times_of(LINK) == {plain: {1024: 5.0, 2048: 6.0}}
    write_table(table_path(LINK), LINK, {"torch": "2"}, {plain: {2048: 7.5}, int8: {2048: 3.0}})
    assert times_of(LINK) == {plain: {1024: 5.0, 2048: 7.5}, int8: {2048: 3.0}}
    assert read_table(table_path(LINK))[0] == LINK and [path.name for path in folder.iterdir()] == ["gloo-cpu-2x1.json"]


def test_a_table_of_another_link_is_refused(folder):
    other = Link("gloo", "cpu", 3)
    write_table(table_path(LINK), other, {}, {Key("all_reduce", "plain"): {1024: 5.0}})
    with pytest.raises(ConfigError, match="is for the link gloo-cpu-3x1, not gloo-cpu-2x1.*tune_link"):
        times_of(LINK)
    with pytest.raises(ConfigError, match="is for the link gloo-cpu-3x1"):
        write_table(table_path(LINK), LINK, {}, {})


GOOD = {"op": "all_reduce", "wire": "int8", "bytes": 1024, "us": 5.0}
HEAD = {"version": 1, "link": {"backend": "gloo", "device": "cpu", "ranks": 2, "hosts": 1}}


@pytest.mark.parametrize(
    "data, words",
    [
        ("{", "cannot be read"),
        ([], "version 1"),
        ({**HEAD, "version": 2, "entries": []}, "version 1"),
        ({**HEAD, "link": {"backend": "gloo"}, "entries": []}, "'link' has backend"),
        ({**HEAD, "entries": [{"op": "all_reduce"}]}, "an entry has op"),
        ({**HEAD, "entries": [{**GOOD, "op": "broadcast"}]}, "op is one of"),
        ({**HEAD, "entries": [GOOD, {**GOOD, "wire": "int3"}]}, "entry 1 .*int3"),
        ({**HEAD, "entries": [{**GOOD, "bytes": 0}]}, "bytes is a positive"),
        ({**HEAD, "entries": [{**GOOD, "us": float("inf")}]}, "us is a positive"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_malformed_tables_are_named(folder, data, words):
    table_path(LINK).write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ConfigError, match=f"gloo-cpu-2x1.json.*{words}"):
        times_of(LINK)


@pytest.fixture
def group():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_links_of_groups(group, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert link_of(group, cpu) == Link("fake", "cpu", 4, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert link_of(group, cpu).hosts == 2
    assert str(link_of(dist.new_group([0, 1]), cpu)) == "fake-cpu-2x1"
    assert str(link_of(dist.new_group([0, 2]), cpu)) == "fake-cpu-2x2"


def test_tuning_without_a_link_is_refused(group, capsys):
    with pytest.raises(CommunicationError, match="one rank"):
        tune_link(dist.new_group([0]))
    with pytest.raises(ConfigError, match="at least 1024 bytes"):
        tune_link(sizes=[512])
    with pytest.raises(ConfigError, match="ops=.*broadcast"):
        tune_link(ops=["broadcast"])
    with pytest.raises(ConfigError, match="no wire format"):
        tune_link(wires=["int2"])
    with pytest.raises(SystemExit):
        main(["--ops", "broadcast"])
    assert "--ops" in capsys.readouterr().err


def test_tuning_needs_a_process_group():
    with pytest.raises(CommunicationError, match="init_process_group"):
        tune_link()


def test_tuning_within_a_budget(group, folder, capsys):
    """A pretended group: its times mean nothing, but the table and what is left out do."""
    found = tune_link(wires=["int8"], sizes=[4096], ops=["all_reduce"])
    link = link_of(group, torch.device("cpu"))
    assert times_of(link) == found and set(found) == {Key("all_reduce", "plain"), Key("all_reduce", "int8")}
    assert tune_link(wires=["int8"], sizes=[8192], ops=["all_reduce"], seconds=-1.0) == {}
    said = capsys.readouterr().out
    assert "4,096 bytes: plain" in said and "left out: 8,192 bytes" in said and times_of(link) == found
