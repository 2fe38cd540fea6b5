"""Weights with an input order: the stored columns are a permutation of the features, and the activation is gathered."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor, compare, explain, load_safetensors, save_safetensors
from intscale_compile.errors import CheckpointError, CompileError, ShardingError, UnsupportedOpError, WeightError
from intscale_compile.parallel.sharding import shard, unshard
from intscale_compile.saving.shard_reading import read_shards
from intscale_compile.tensors.joined_rows import joined_in_place
from tests.support.joined import rewritten
from tests.support.static import outlying, prepared

K = 96
FORMATS = {
    "group": IntScaleConfig(group_size=32),
    "channel": IntScaleConfig(group_size=-1),
    "w8a8": IntScaleConfig(weight_bits=8),
}


def ordered(rows=64, order=None, config=None, static=None):
    """A weight quantized in the order ``order``, and the same one with its columns as they are stored."""
    order = torch.randperm(K) if order is None else order
    stored = IntScaleTensor.from_hp(torch.randn(rows, K)[:, order], config or FORMATS["group"])
    stored = stored.with_activation_scale(static)
    return stored.with_input_order(order), stored, order


class Siblings(nn.Module):
    """Linears that read one activation, one input order for each."""

    def __init__(self, orders, static=None):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(K, n, bias=n == 32) for n in (64, 32, 32))
        for part, order in zip(self.parts, orders):
            weight = (
                ordered(part.out_features, order, static=static)[0]
                if order is not None
                else ordered(part.out_features)[1]
            )
            part.weight = nn.Parameter(weight, requires_grad=False)
        self.requires_grad_(False)

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


def compiled(function, backend="intscale", **options):
    return torch.compile(function, backend=backend, **options)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def expect(run, model, x):
    with torch.no_grad():
        found, wanted = run(x), model(x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- the layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [None, 0.05])
@pytest.mark.parametrize("name", FORMATS)
def test_product_is_that_of_the_gathered_activation(name, static):
    weight, stored, order = ordered(config=FORMATS[name], static=static)
    assert weight.validate().input_order.dtype == torch.int32 and torch.equal(weight.codes, stored.codes)
    bias = torch.randn(64)
    for dtype in (torch.float32, torch.bfloat16):
        x = outlying(2, 5, K, dtype=dtype)
        for b in (None, bias.to(dtype)):
            expected = F.linear(x[..., order], stored, b)
            assert torch.equal(F.linear(x, weight, b), expected)
            assert torch.equal(F.linear(x, weight.to_packing("tiled"), b), expected)
        assert torch.equal(x[0] @ weight.t(), F.linear(x[0][:, order], stored))
    assert torch.equal(F.linear(x[0, 0], weight), F.linear(x[0, 0, order], stored))


def test_dequantize_undoes_the_order():
    weight, stored, order = ordered()
    assert torch.equal(weight.dequantize()[:, order], stored.dequantize())
    assert torch.equal(weight.t().dequantize(torch.float64), weight.dequantize(torch.float64).t())
    x = torch.randn(20, K)
    exact = x @ weight.dequantize().t()
    assert (F.linear(x, weight) - exact).norm() < 0.02 * exact.norm()


def test_gradients_go_straight_through():
    model = Siblings([torch.randperm(K)] * 3)
    dense = torch.cat([part.weight.dequantize() for part in model.parts])
    grad = torch.randn(5, dense.shape[0])
    for run in (model, rewritten(model)):
        x = outlying(5, K).requires_grad_()
        torch.cat(run(x), dim=-1).backward(grad)
        torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-4, atol=1e-5)


# --- structure ----------------------------------------------------------------------------------------------------------


def test_operations_on_rows_keep_the_order():
    weight, stored, order = ordered(128)
    other = ordered(32, order)[0]
    dense = weight.dequantize()
    kept = {
        "slice": (weight[64:], dense[64:]),
        "narrow": (weight.narrow(0, 64, 64), dense[64:]),
        "rows": (weight[torch.tensor([5, 2, 2])], dense[[5, 2, 2]]),
        "split": (weight.split(64)[1], dense[64:]),
        "transpose": (weight.t().t(), dense),
        "to": (weight.to(torch.bfloat16), dense.bfloat16()),
        "cat": (torch.cat([weight, other]), torch.cat([dense, other.dequantize()])),
        "tiled": (weight.to_packing("tiled"), dense),
    }
    for name, (found, expected) in kept.items():
        assert torch.equal(found.validate().input_order, weight.input_order), name
        assert torch.equal(found.dequantize(), expected), name
    target = ordered(128)[0]
    target.copy_(weight)
    assert torch.equal(target.dequantize(), dense) and target.input_order is not weight.input_order
    first, second = weight.clone(), other.clone()
    joined = joined_in_place([first, second])
    assert torch.equal(joined.dequantize(), kept["cat"][1]) and torch.equal(first.dequantize(), dense)
    assert "input order" in repr(weight) and "input order" not in repr(stored)


def test_what_has_no_meaning_is_refused():
    weight, stored, order = ordered()
    for operation in (
        lambda: weight[:, :64],
        lambda: weight.t()[:32],
        lambda: weight.view(2, 32, K),
        lambda: torch.stack([weight, weight]),
        lambda: torch.cat([weight, ordered()[0]]),
        lambda: torch.cat([weight, stored]),
        lambda: stored.clone().copy_(weight),
    ):
        with pytest.raises(UnsupportedOpError, match="input order|data_names"):
            operation()
    assert joined_in_place([weight, ordered()[0]]) is None
    for change, message in (
        (lambda: weight.with_rotation(32), "rotation=32 of a weight with an input order"),
        (lambda: stored.with_rotation(32).with_input_order(order), "together with rotation=32"),
        (lambda: torch.stack([stored, stored]).with_input_order(order), "stack of experts"),
        (lambda: stored.with_input_order(order[:-1]), "no permutation of the 96"),
        (lambda: stored.with_input_order(order.clamp(max=90)), "no permutation"),
        (lambda: stored.with_input_order(order.float()), "no permutation"),
    ):
        with pytest.raises(WeightError, match=message):
            change()
    assert weight.with_input_order(None).input_order is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.replaced(input_order=w.input_order.long()), "input order is torch.int64"),
        (lambda w: w.replaced(input_order=w.input_order[:, :-1]), r"input_order has shape \(1, 95\)"),
        (lambda w: w.replaced(input_order=w.input_order + 1), "no permutation of 96"),
        (lambda w: w.replaced(rotation=32), "input order together with rotation=32"),
        (lambda w: w.replaced(input_order=7), "input_order is int, not a tensor"),
    ],
)
def test_damaged_orders_are_found(change, message):
    with pytest.raises(CheckpointError, match=message):
        change(ordered()[0]).validate()


def test_shards():
    weight, _, order = ordered(128)
    parts = [shard(weight, 0, i, 2).validate() for i in range(2)]
    assert all(torch.equal(part.input_order, weight.input_order) for part in parts)
    assert torch.equal(unshard(parts, 0).dequantize(), weight.dequantize())
    with pytest.raises(ShardingError, match=r"layer: it has an input order.*divide its rows"):
        shard(weight, 1, 0, 3, name="layer")


# --- storage ------------------------------------------------------------------------------------------------------------


def test_round_trips(tmp_path):
    model, x = Siblings([torch.randperm(K)] * 3), outlying(5, K)
    shared = model.parts[0].weight.input_order
    for part in model.parts:
        part.weight.input_order = shared
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save_safetensors(model, tmp_path / "model.safetensors")
    first, second = Siblings([torch.randperm(K)] * 3), Siblings([torch.randperm(K)] * 3)
    first.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.load_state_dict(load_safetensors(tmp_path / "model.safetensors"), assign=True)
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    copied = copy.deepcopy(model)
    for loaded in (first, second, copied, model.to("cpu")):
        assert all(torch.equal(a, b) for a, b in zip(loaded(x), expected, strict=True))
    for kept in (list(again.values()), [part.weight for part in copied.parts]):
        memory = {w.input_order.data_ptr() for w in kept if isinstance(w, IntScaleTensor)}
        assert len(memory) == 1, "siblings share one order"

    rows = read_shards(tmp_path / "model.safetensors", {"parts.0.weight": (-2, 1, 1)}, 1, 2)["parts.0.weight"]
    assert torch.equal(rows.dequantize(), model.parts[0].weight.dequantize()[32:])
    with pytest.raises(ShardingError, match=r"parts.0.weight: it has an input order"):
        read_shards(tmp_path / "model.safetensors", {"parts.0.weight": (-1, 1, 1)}, 1, 3)


# --- compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [None, 0.05])
def test_siblings_with_one_order_are_merged(static):
    model, x = Siblings([torch.randperm(K)] * 3, static), outlying(5, K)
    assert len({id(part.weight.input_order) for part in model.parts}) == 3
    run = compiled(model, fullgraph=True, dynamic=True) if static is None else rewritten(model)
    expect(run, model, x)
    expect(run, model, outlying(17, K))
    assert len({id(part.weight.input_order) for part in model.parts}) == 1, "one tensor for all siblings"
    if static is not None:
        return
    report = explain(model, x)
    assert report.gemms == report.activation_quantizations == 1 and not report.notes
    assert {layer.activation for layer in report.layers} == {"input order, per token"}

    order = torch.randperm(K)  # a new order for all is seen, one of its own is an error
    state = {
        name: w.with_input_order(order) if name.endswith("weight") else w for name, w in model.state_dict().items()
    }
    model.load_state_dict(state)
    expect(run, model, x)
    state["parts.1.weight"] = state["parts.1.weight"].with_input_order(torch.randperm(K))
    model.load_state_dict(state)
    with pytest.raises(CompileError, match=r"parts.*no longer one input order"), torch.no_grad():
        run(x)


def test_siblings_with_other_orders_stay_apart():
    order = torch.randperm(K)
    model, x = Siblings([order, torch.randperm(K), None]), outlying(5, K)
    report = explain(model, x)
    assert report.gemms == report.activation_quantizations == 3
    (note,) = report.notes
    assert note == (
        "parts.0.weight and parts.1.weight read one activation in different input orders, and are not merged."
    )
    expect(rewritten(model), model, x)


def test_other_backends_and_written_activations():
    """A backend that knows nothing of our passes; and an activation that changes between two siblings."""
    order = torch.randperm(K)
    model, x = Siblings([order] * 3), outlying(5, K)
    expect(compiled(model, backend="aot_eager"), model, x)

    def written(x):
        x = x * 2
        first = model.parts[0](x)
        x[:, 3] = 0
        return first, model.parts[1](x)

    expect(rewritten(written), written, x)


@pytest.mark.parametrize("form", ["order", "rotation"])
def test_comparison_with_the_original(form):
    """``compare`` sees the weight in its stored form: its columns in their order, or rotated."""
    plain = nn.Sequential(nn.Linear(K, 64), nn.Linear(64, 64)).requires_grad_(False)
    other, order, dense = copy.deepcopy(plain), torch.randperm(K), plain[0].weight.detach()
    weight = prepared(dense, 32) if form == "rotation" else prepared(dense[:, order]).with_input_order(order)
    other[0].weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(40, K)
    assert compare(plain, other, x).first is None
    weight.scale[9, 1] = 1 if weight.scale[9, 1] > 4 else 15
    assert "group 1 row 9" in compare(plain, other, x).first.note
