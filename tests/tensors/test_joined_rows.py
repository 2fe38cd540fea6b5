"""Merged weights without a second copy: memory, updates through the sources, graphs that merge differently."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.compile.binding import BoundGraph
from intscale_compile.tensors import joined_rows
from intscale_compile.tensors.joined_rows import joined_in_place
from intscale_compile.tensors.linear import linear
from intscale_compile.tensors.operators import concatenate
from tests.support.joined import NAMES, QUICK, Attention, X, backend_of, live_bytes, memory_of, rewritten


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def binds(monkeypatch):
    """How often weights were bound anew."""
    calls = []
    original = BoundGraph._bind
    monkeypatch.setattr(BoundGraph, "_bind", lambda self, args: calls.append(1) or original(self, args))
    return calls


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.generated
@pytest.mark.parametrize("packing", [pytest.param("plain", marks=pytest.mark.slow), "tiled"])
@pytest.mark.parametrize("inductor", [False, True])
def test_one_copy_of_merged_weights(packing, inductor):
    model = Attention(config=IntScaleConfig(scale_search="absmax", packing_format=packing))
    expected, before = model(X), live_bytes()
    run = torch.compile(model, backend="intscale") if inductor else rewritten(model)
    y = run(X)
    torch.testing.assert_close(y, expected)
    del y
    assert live_bytes() - before < 4096
    for name in NAMES:
        assert len({memory_of(getattr(m.weight, name)) for m in (model.q, model.k, model.v)}) == 1
        assert len({memory_of(getattr(m.weight, name)) for m in (model.gate, model.up)}) == 1
    assert torch.equal(model(X), expected)  # eager reads the slices


def test_there_is_one_copy_already_while_the_graph_compiles():
    """Dynamo holds the former inner tensors until then; on a GPU they were a third of the peak memory."""
    model = Attention()
    before, during = live_bytes(), []

    def backend(gm, example_inputs):
        compiled = backend_of([])(gm, example_inputs)
        during.append(live_bytes())
        return compiled

    former = model.q.weight.qdata
    torch.compile(model, backend=backend, fullgraph=True)(X)
    assert during[0] - before < 8192  # a second copy would be 45 KB
    assert former is not model.q.weight.qdata and torch.equal(former, model.q.weight.qdata)


def test_one_copy_of_plain_weights():
    model = Attention(config=None)
    before = live_bytes()
    run = rewritten(model)
    run(X)
    packed = sum(IntScaleTensor.from_hp(p, QUICK).nbytes_packed() for p in model.parameters())
    assert live_bytes() - before < packed + 4096


def test_memory_is_freed_with_the_model():
    before = live_bytes()
    for config in (QUICK, None):
        model = Attention(config=config)
        model.compile(backend="intscale")
        model(X)
        del model
    torch._dynamo.reset()
    assert live_bytes() - before < 4096


def test_transposed_sources_share_too():
    weights = [IntScaleTensor.from_hp(torch.randn(64, 128), QUICK) for _ in range(2)]
    params = [nn.Parameter(w.t(), requires_grad=False) for w in weights]
    expected = torch.cat([linear(X, w) for w in weights], -1)
    del weights
    before = live_bytes()
    y = rewritten(lambda x: torch.cat([x @ params[0], x @ params[1]], -1))(X)
    assert torch.equal(y, expected)
    assert memory_of(params[0].qdata) == memory_of(params[1].qdata)
    del y
    assert live_bytes() - before < 4096


# --- what cannot share ----------------------------------------------------------------------------------------------


def parts_of(rows, packing="plain", **config):
    config = IntScaleConfig(scale_search="absmax", packing_format=packing, **config)
    return [IntScaleTensor.from_hp(torch.randn(n, 128), config).detach() for n in rows]


@pytest.mark.parametrize("rows", [(64, 128), (64, 64, 64), (128, 70)])
@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("config", [{}, {"group_size": 32}, {"weight_bits": 8}, {"amplifier": 1024}], ids=str)
def test_joined_in_place_is_concatenate(rows, packing, config):
    parts = parts_of(rows, packing, **config)
    wanted = concatenate(copy.deepcopy(parts), 0)
    codes = [part.codes.clone() for part in parts]
    joined = joined_in_place(parts)
    again = joined_in_place(parts)
    for name in (*NAMES, *IntScaleTensor.tensor_attribute_names):
        found, other = getattr(joined, name), getattr(wanted, name)
        assert torch.equal(found, other) if name in NAMES else found == other, name
        if name in NAMES:
            assert getattr(again, name) is found
    for part, before in zip(parts, codes):
        assert torch.equal(part.codes, before)
        part.validate()


def test_ragged_tiles_are_kept_twice_and_said_once(caplog):
    joined_rows.log_once.cache_clear()
    model = Attention(config=IntScaleConfig(scale_search="absmax", packing_format="tiled"), rows=(70, 64, 64))
    expected = model(X)
    with caplog.at_level(logging.INFO, "intscale_compile"):
        run = rewritten(model)
        assert torch.equal(run(X), expected)
        run(X)
    assert sum("kept twice" in r.message for r in caplog.records) == 1
    assert memory_of(model.q.weight.qdata) != memory_of(model.k.weight.qdata)
    model.q.weight.copy_(IntScaleTensor.from_hp(torch.randn(70, 128), QUICK))
    assert torch.equal(run(X), model(X)) and not torch.equal(model(X), expected)
    model.k.weight.qdata.fill_(0x88)
    assert torch.equal(run(X), model(X))
    model.v.weight[:64].copy_(IntScaleTensor.from_hp(torch.randn(64, 128), QUICK).to_packing("tiled"))
    assert torch.equal(run(X), model(X))


def test_memory_that_something_else_holds_is_not_taken_away():
    model = Attention()
    state = model.state_dict()  # shares the data of the parameters
    run = rewritten(model)
    run(X)
    assert memory_of(model.q.weight.qdata) == memory_of(state["q.weight"].qdata)
    state["q.weight"].qdata.fill_(0x88)
    model.q.weight.per_tensor_scale.mul_(1.0)  # an alias counts writes of its own
    assert torch.equal(run(X), model(X)) and not model(X)[:, :128].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a, a),
        lambda a, b: (a, b.to_packing("tiled")),
        lambda a, b: (a, a.replaced()),
        lambda a, b: (a, b.replaced(scale=b.scale.to(torch.int16))),
    ],
)
def test_parts_that_do_not_fit(change):
    parts = change(*parts_of((64, 64)))
    memory = [memory_of(part.qdata) for part in parts]
    assert joined_in_place(parts) is None
    assert [memory_of(part.qdata) for part in parts] == memory


# --- updates --------------------------------------------------------------------------------------------------------


def other(rows):
    return IntScaleTensor.from_hp(torch.randn(rows, 128), QUICK)


UPDATES = {
    "copy_": lambda m: m.k.weight.copy_(other(64)),
    "data copy_": lambda m: m.q.weight.data.copy_(other(128)),
    "slice": lambda m: m.q.weight[32:64].copy_(other(32)),
    "qdata copy_": lambda m: m.v.weight.qdata.copy_(other(64).qdata),
    "qdata rows": lambda m: m.v.weight.qdata[3:5].fill_(0x88),
    "scale": lambda m: m.v.weight.scale.fill_(2),
    "row scale": lambda m: m.k.weight.per_tensor_scale.mul_(2.0),
    "load_state_dict": lambda m: m.load_state_dict(Attention().state_dict()),
    "load_state_dict assign": lambda m: m.load_state_dict(Attention().state_dict(), assign=True),
    "exchanged parameter": lambda m: setattr(m.k, "weight", nn.Parameter(other(64), requires_grad=False)),
    "exchanged codes": lambda m: setattr(m.k.weight, "qdata", other(64).detach().qdata),
    "exchanged scales": lambda m: setattr(m.q.weight, "scale", torch.ones_like(m.q.weight.scale)),
    "moved": lambda m: m.to("cpu"),
    "shared": lambda m: m.share_memory(),
}


def assert_seen(update, inference, model, run, binds):
    before, bound = model(X), len(binds)
    gc.collect()  # an op by op graph keeps its fake tensors, and they refer to parameters that are to be exchanged
    with torch.no_grad():
        UPDATES[update](model)
    gc.collect()  # a quantized nn.Linear is part of a cycle: nothing else may hold what was assigned
    with torch.inference_mode(inference):
        y = run(X)
        assert torch.equal(y, model(X)), update
        assert torch.equal(run(X), y), update
    assert torch.equal(y, before) == (update in ("moved", "shared")), update
    in_place = not any(word in update for word in ("assign", "exchanged", "moved", "shared"))
    assert len(binds) - bound == (0 if in_place else 1), update
    assert len({memory_of(m.weight.qdata) for m in (model.q, model.k, model.v)}) == 1, update


@pytest.mark.parametrize("inference", [False, True])
def test_updates_one_after_another_are_seen(inference, binds):
    gc.collect()
    gc.freeze()  # each update looks for cycles: not among everything that was imported and traced before
    model, graphs = Attention(), []
    run = rewritten(model, graphs)
    with torch.inference_mode(inference):
        for _ in range(2):
            run(X)
    for update in UPDATES:
        assert_seen(update, inference, model, run, binds)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("inference", [False, True])
def test_updates_are_seen(update, inference, binds):
    model, graphs = Attention(), []
    run = rewritten(model, graphs)
    with torch.inference_mode(inference):
        for _ in range(2):
            run(X)
    assert_seen(update, inference, model, run, binds)
    assert len(graphs) == 1


def test_updates_of_plain_weights_are_seen(binds):
    model = Attention(config=None)
    run = rewritten(model)
    run(X)
    before = live_bytes()
    with torch.no_grad():
        model.k.weight.mul_(2.0)
        y = run(X)
        model.q.weight = nn.Parameter(torch.randn(128, 128), requires_grad=False)
        z = run(X)
    torch._dynamo.reset()
    assert torch.equal(z, rewritten(copy.deepcopy(model))(X)) and not torch.equal(y, z)
    del y, z
    torch._dynamo.reset()
    assert live_bytes() - before < 4096


def test_model_moves_after_a_compiled_run():
    model = Attention()
    run = torch.compile(model, backend="intscale")
    y = run(X)
    assert torch.equal(run.to("cpu")(X), y)
    assert torch.equal(run.double().float()(X), y)


def test_model_quantized_in_inference_mode_can_be_written_to():
    with torch.inference_mode():
        model = Attention()
        run = rewritten(model)
        run(X)
        model.k.weight.copy_(other(64))
        assert torch.equal(run(X), model(X))
    model.k.weight.qdata.fill_(0x88)
    assert torch.equal(run(X), model(X))


# --- several graphs over the same weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["forward", "keys"])
def test_graphs_that_merge_differently(first, binds):
    model = Attention()
    whole, keys = rewritten(model), rewritten(model.keys)
    expected, expected_keys, before = model(X), model.keys(X), live_bytes()
    order = [(whole, expected), (keys, expected_keys)]
    for run, wanted in order if first == "forward" else order[::-1]:
        assert torch.equal(run(X), wanted)
    for _ in range(2):
        assert torch.equal(whole(X), expected) and torch.equal(keys(X), expected_keys)
    bound = len(binds)
    for _ in range(3):
        whole(X), keys(X)
    assert len(binds) == bound
    assert live_bytes() - before < 4096
    model.v.weight.copy_(other(64))
    assert torch.equal(whole(X), model(X)) and torch.equal(keys(X), model.keys(X))


def test_graphs_that_overlap_do_not_take_weights_from_each_other(binds):
    weights = [nn.Parameter(part, requires_grad=False) for part in parts_of((64, 64, 64))]
    a, b, c = weights
    first = rewritten(lambda x: torch.cat([linear_of(x, a), linear_of(x, b)], -1))
    second = rewritten(lambda x: torch.cat([linear_of(x, b), linear_of(x, c)], -1))
    for _ in range(2):
        first(X), second(X)
    bound = len(binds)
    for _ in range(3):
        assert torch.equal(first(X), torch.cat([linear(X, a), linear(X, b)], -1))
        assert torch.equal(second(X), torch.cat([linear(X, b), linear(X, c)], -1))
    assert len(binds) == bound
    b.copy_(other(64))
    assert torch.equal(first(X), torch.cat([linear(X, a), linear(X, b)], -1))
    assert torch.equal(second(X), torch.cat([linear(X, b), linear(X, c)], -1))


def linear_of(x, weight):
    return torch.nn.functional.linear(x, weight)


def test_layers_that_share_one_graph_bind_once_each(binds):
    layers = nn.ModuleList([Attention() for _ in range(3)])
    expected, before, graphs = [layer(X) for layer in layers], live_bytes(), []
    backend = backend_of(graphs)
    for layer in layers:
        layer.compile(backend=backend)
    for _ in range(3):
        for layer, wanted in zip(layers, expected):
            assert torch.equal(layer(X), wanted)
    assert len(graphs) == 1 and len(binds) == 3
    assert live_bytes() - before < 8192
