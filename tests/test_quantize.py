"""torchao's ``quantize_`` with our configuration: what it selects, what it leaves alone, and that a failed call
changes nothing.
"""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import OverflowProofError, WeightError
from intscale_compile.tensors.selection import is_decided
from tests.support.quantized import BLOCKS, QUICK, Model, quantized_names

# --- selection ------------------------------------------------------------------------------------------------------


def test_default_filter_takes_linears_and_leaves_head_embedding_and_tiny_layers(caplog):
    model, ids = Model(), torch.arange(12)[None]
    before = model(ids)[0]
    bias = model.blocks[0]["up"].bias
    with caplog.at_level(logging.INFO, "intscale_compile"):
        quantize_(model, QUICK)
    assert quantized_names(model) == BLOCKS
    assert model.blocks[0]["up"].bias is bias and not model.blocks[0]["up"].weight.requires_grad
    after = model(ids)[0]
    assert 0 < (after - before).norm() / before.norm() < 0.2
    assert "weight=IntScaleTensor(shape=(96, 64), int4" in repr(model)


@pytest.mark.parametrize("head", ["lm_head", "score"])
def test_tied_output_embedding_is_left_alone_whatever_its_name(head):
    """Plain torch, no transformers: the weight is the embedding's, so quantizing it would untie them."""
    model = Model(tied=True, head=head)
    quantize_(model, QUICK)
    assert quantized_names(model) == BLOCKS
    assert getattr(model, head).weight is model.embed.weight


def test_head_of_another_name_that_is_not_tied_is_quantized():
    """Nothing says that it is an output embedding; the exception is for names and models that say so."""
    model = Model(head="score")
    quantize_(model, QUICK)
    assert quantized_names(model) == sorted([*BLOCKS, "score.weight"])


def test_head_that_transformers_would_report_is_left_alone():
    model = Model(head="score")
    model.get_output_embeddings = lambda: model.score
    quantize_(model, QUICK)
    assert quantized_names(model) == BLOCKS


@pytest.mark.parametrize("features", [(15, 64), (64, 15), (16, 16), (1, 1)])
def test_tiny_layers(features):
    model = nn.Sequential(nn.Linear(*features))
    quantize_(model, QUICK)
    assert (quantized_names(model) == ["0.weight"]) is (min(features) >= 16)


def test_custom_filter_that_names_the_head_quantizes_it():
    """An explicit choice is obeyed: head, tied weight and tiny layer."""
    model = Model()
    quantize_(model, QUICK, filter_fn=lambda module, name: name in ("lm_head", "tiny"))
    assert quantized_names(model) == ["lm_head.weight", "tiny.weight"]
    model = Model(tied=True)
    quantize_(model, QUICK, filter_fn=lambda module, name: name == "lm_head")
    assert quantized_names(model) == ["lm_head.weight"]
    assert not isinstance(model.embed.weight, IntScaleTensor)


def test_filter_none_and_a_bare_linear():
    model = Model()
    quantize_(model, QUICK, filter_fn=None)
    assert quantized_names(model) == BLOCKS
    layer = nn.Linear(64, 32)
    quantize_(layer, QUICK)
    assert isinstance(layer.weight, IntScaleTensor)


def test_weights_are_those_of_from_hp():
    model = Model()
    wanted = IntScaleTensor.from_hp(model.blocks[1]["up"].weight.detach(), QUICK)
    quantize_(model, QUICK)
    found = model.blocks[1]["up"].weight
    assert torch.equal(found.dequantize(), wanted.dequantize()) and repr(found.data) == repr(wanted)


# --- failed calls ---------------------------------------------------------------------------------------------------


def chain(layers=3):
    return nn.ModuleDict({f"layer{i}": nn.Linear(64, 64) for i in range(layers)})


def break_with(change):
    def broken():
        model = chain()
        model["layer2"].weight = nn.Parameter(change(model["layer2"].weight.detach().clone()), requires_grad=False)
        return model

    return broken


def with_nan(weight):
    weight[63, 63] = float("nan")
    return weight


FAILURES = {
    "nan": (break_with(with_nan), QUICK, "layer2.weight has NaN or Inf"),
    "inf": (break_with(lambda w: w / 0), QUICK, "layer2.weight has NaN or Inf"),
    "meta": (break_with(lambda w: w.to("meta")), QUICK, "layer2.weight is on the meta device"),
    "integers": (break_with(lambda w: w.to(torch.int32)), QUICK, "layer2.weight is torch.int32"),
    "amplified scale": (
        break_with(lambda w: w + 1e6),
        IntScaleConfig(amplifier=1024),
        "amplifier=1024 makes a group scale",
    ),
    "all meta": (lambda: chain().to("meta"), QUICK, "layer0.weight is on the meta device"),
}


def assert_unchanged_after(model, error, message, call):
    before, text = dict(model.named_parameters()), repr(model)
    values = {name: p.detach().clone() for name, p in before.items()}
    with pytest.raises(error, match=message):
        call(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter is before[name], f"{name} was replaced"
        if parameter.device.type != "meta":
            assert torch.equal(parameter.detach().nan_to_num(), values[name].nan_to_num())
    assert not is_decided(model), "a failed call must not tell the backend what to leave out"
    assert repr(model) == text


@pytest.mark.parametrize("name", FAILURES)
def test_failed_call_leaves_every_parameter_and_names_the_bad_one(name):
    make, config, message = FAILURES[name]
    error = OverflowProofError if name == "amplified scale" else WeightError
    assert_unchanged_after(make(), error, message, lambda model: quantize_(model, config))


def test_failed_call_with_overflow_names_the_layer():
    """The codes of the last layer's rows are too large for its length: only seen after the others were quantized."""
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "last": nn.Linear(32768, 16, bias=False)})
    nn.init.uniform_(model["last"].weight, 1.999, 2.0)
    config = IntScaleConfig(amplifier=1024, scale_search="absmax")
    assert_unchanged_after(model, OverflowProofError, "int32 accumulator", lambda m: quantize_(m, config))


def test_failed_call_with_a_row_too_long_for_eight_bits():
    """Also with searched scales a row can be too long; then the layers before it must come back as well."""
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "last": nn.Linear(140_000, 16, bias=False)})
    nn.init.uniform_(model["last"].weight, 1.999, 2.0)
    config = IntScaleConfig(weight_bits=8, scale_search="absmax")
    assert_unchanged_after(model, OverflowProofError, "split the layer", lambda m: quantize_(m, config))


def test_failed_call_of_mixed_configurations():
    """The first layer's configuration cannot fail, the last one's can: the first is undone all the same."""
    model = chain()
    nn.init.constant_(model["layer2"].weight, 1e6)
    table = FqnToConfig({"layer0": QUICK, "layer1.weight": QUICK, "re:layer2": IntScaleConfig(amplifier=1024)})
    assert_unchanged_after(model, OverflowProofError, "amplifier=1024", lambda m: quantize_(m, table, filter_fn=None))


@pytest.mark.parametrize("pattern", ["layer2", "re:.*2", "layer2.weight", "_default"])
def test_failed_fqn_call(pattern):
    model = FAILURES["nan"][0]()
    table = {"layer0": QUICK, "layer1": QUICK, pattern: QUICK}
    assert_unchanged_after(
        model, WeightError, "layer2.weight has NaN", lambda m: quantize_(m, FqnToConfig(table), filter_fn=None)
    )


@pytest.mark.parametrize("key", ["outer", "re:.*", "re:oute.", "outer.nothing"])
def test_fqn_of_a_container(key):
    """torchao hands the container over after its siblings; it has no weight, so the siblings must come back. A name
    of nothing is nothing.
    """
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "outer": chain()})
    call = lambda m: quantize_(m, FqnToConfig({"first": QUICK, key: QUICK}), filter_fn=None)  # noqa: E731
    if key == "outer.nothing":
        call(model)
        assert quantized_names(model) == ["first.weight"]
    else:
        assert_unchanged_after(model, WeightError, "has no linear weight|has shape", call)


@pytest.mark.parametrize(
    "last, message",
    [
        (nn.Embedding(32, 64), "last.weight: Embedding has no linear weight"),
        (nn.ReLU(), "last.weight: ReLU has no linear weight"),
        (nn.LayerNorm(64), "last.weight has shape"),
    ],
    ids=["embedding", "no weight", "vector"],
)
def test_filter_that_selects_something_else(last, message):
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "last": last})
    every = lambda module, name: name in ("first", "last")  # noqa: E731
    assert_unchanged_after(model, WeightError, message, lambda m: quantize_(m, QUICK, filter_fn=every))


def test_call_after_a_failed_one():
    model = FAILURES["nan"][0]()
    with pytest.raises(WeightError):
        quantize_(model, QUICK)
    with torch.no_grad():
        model["layer2"].weight.nan_to_num_()
    quantize_(model, QUICK)
    assert len(quantized_names(model)) == 3


# --- repeated calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "again", [QUICK, IntScaleConfig(weight_bits=8), IntScaleConfig(amplifier=1024)], ids=["same", "other", "amplifier"]
)
def test_second_call_changes_nothing(again):
    model, ids = Model(), torch.arange(12)[None]
    quantize_(model, QUICK)
    before, output = dict(model.named_parameters()), model(ids)
    quantize_(model, again)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(model(ids), output))


def test_second_call_adds_what_the_first_left_out():
    model = Model()
    quantize_(model, QUICK)
    quantize_(
        model, IntScaleConfig(weight_bits=8, scale_search="absmax"), filter_fn=lambda module, name: name == "lm_head"
    )
    assert quantized_names(model) == sorted([*BLOCKS, "lm_head.weight"])
    assert model.lm_head.weight.weight_bits == 8 and model.blocks[0]["up"].weight.weight_bits == 4


def test_calls_on_different_models_do_not_share_a_plan():
    """The plan belongs to one call: names and exceptions of the first model must not be applied to the second."""
    first, second = Model(), nn.ModuleDict({"outer": Model(head="score"), "lm_head": nn.Linear(64, 64)})
    quantize_(first, QUICK)
    quantize_(second, QUICK)
    assert quantized_names(first) == BLOCKS
    assert quantized_names(second) == sorted([*(f"outer.{n}" for n in BLOCKS), "outer.score.weight"])
    broken = chain()
    broken["layer1"].weight.data[0] = float("inf")
    with pytest.raises(WeightError, match="layer1.weight"):
        quantize_(broken, QUICK)


def test_nested_call_has_its_own_plan():
    """A filter that itself quantizes another model: the innermost running call counts."""
    inner = Model()

    def filter_fn(module, name):
        if not quantized_names(inner):
            quantize_(inner, QUICK)
        return name == "layer1"

    outer = chain()
    quantize_(outer, QUICK, filter_fn=filter_fn)
    assert quantized_names(outer) == ["layer1.weight"] and quantized_names(inner) == BLOCKS


@pytest.mark.parametrize("config", [QUICK, IntScaleConfig(amplifier=64)], ids=["row", "amplifier"])
def test_model_and_original_weights_are_freed(config):
    """Neither the plan nor the means to undo it outlive the call."""
    model = chain()
    original, alive = weakref.ref(model["layer0"].weight), weakref.ref(model)
    quantize_(model, config)
    model["layer0"](torch.randn(2, 64))
    gc.collect()
    assert original() is None, "the high-precision weight is still held"
    del model
    gc.collect()
    assert alive() is None


def test_model_is_freed_after_a_failed_call():
    model = FAILURES["nan"][0]()
    alive = weakref.ref(model)
    with pytest.raises(WeightError):
        quantize_(model, QUICK)
    del model
    gc.collect()
    assert alive() is None


def test_quantizing_inside_no_grad_and_inference_mode():
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            model = chain(1)
            quantize_(model, QUICK)
            assert quantized_names(model) == ["layer0.weight"]
            assert torch.isfinite(model["layer0"](torch.randn(2, 64))).all()
