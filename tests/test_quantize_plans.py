"""All or nothing: ``quantize`` and torchao's ``quantize_`` plan a whole model, and put it back whatever ends the call."""

import copy
import functools
import inspect
import io
import logging
import pickle
import re
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quant_api, quantize_
from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor, quantize
from intscale_compile.errors import ConfigError, OverflowProofError, WeightError
from intscale_compile.reasons import log_once
from intscale_compile.tensors.selection import DECIDED

CONFIG = IntScaleConfig(group_size=32, scale_search="absmax")
INT8 = Int8WeightOnlyConfig()
DOORS = {"quantize": quantize, "quantize_": lambda model, config: quantize_(model, config, None)}
door_of = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def chain(layers=4):
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))).requires_grad_(False)


class Tail(nn.Module):
    """A layer, and an output embedding that only its name tells."""

    def __init__(self):
        super().__init__()
        self.layer, self.lm_head = nn.Linear(64, 64), nn.Linear(64, 96)
        self.requires_grad_(False)


def quantized(model):
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, IntScaleTensor)]


def everything(model):
    """What must be as it was: objects, their order, attributes, hooks and the description."""
    parts = []
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        parts.append((name, type(module), sorted(vars(module)), [(k, id(v)) for k, v in module._parameters.items()]))
        parts.append((list(module._buffers), list(map(id, hooks))))
    return parts, repr(model)


def assert_put_back(model, call, error, match=None):
    before = everything(model)
    with pytest.raises(error, match=match):
        call(model)
    assert everything(model) == before


# --- what may end a call --------------------------------------------------------------------------------------------


class Interrupted(TypeError):
    """An error of somebody else."""


@door_of
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, Interrupted])
def test_whatever_ends_the_call_puts_the_model_back(door, error, monkeypatch):
    model, made = chain(), []
    from_hp = IntScaleTensor.from_hp.__func__

    def third_fails(cls, *args, **kwargs):
        made.append(1)
        if len(made) == 3:
            raise error
        return from_hp(cls, *args, **kwargs)

    monkeypatch.setattr(IntScaleTensor, "from_hp", classmethod(third_fails))
    assert_put_back(model, lambda m: door(m, CONFIG), error)
    monkeypatch.undo()
    door(model, IntScaleConfig(weight_bits=8))  # nothing of the first call is left to be kept
    assert [layer.weight.weight_bits for layer in model] == [8, 8, 8, 8]


@pytest.mark.parametrize("call", range(1, 12))
def test_filter_that_raises(call):
    """Whenever it does: while the plan is made, or when torchao asks it again."""
    seen = []

    def filter_fn(module, name):
        seen.append(name)
        if len(seen) == call:
            raise Interrupted
        return isinstance(module, nn.Linear)

    for door in (quantize, quantize_):
        model, seen[:] = chain(), []
        before = everything(model)
        try:
            door(model, CONFIG, filter_fn)
        except Interrupted:
            assert everything(model) == before
        else:
            assert len(quantized(model)) == 4 and call > len(seen)


@door_of
def test_amplified_scale_that_is_infinite(door):
    model = chain()
    model[2].weight[0, 0] = 3e38
    config = IntScaleConfig(group_size=32, amplifier=1024)
    assert_put_back(model, lambda m: door(m, config), OverflowProofError, r"^2\.weight: amplifier=1024 .* scale of inf")


@door_of
@pytest.mark.parametrize("key", ["1", "re:1", "1.weight"])
def test_table_with_another_librarys_config_first(door, key):
    model = chain()
    model[3].weight[0, 0] = float("nan")
    table = FqnToConfig({"0": INT8, key: CONFIG, "3": CONFIG})
    assert_put_back(model, lambda m: door(m, table), WeightError, r"^3\.weight has NaN")


@door_of
def test_table_whose_other_library_fails_last(door):
    """A bias has one dimension, which torchao's int8 does not take: an error of its own, after we are done."""
    model = chain()
    table = FqnToConfig({"0": CONFIG, "1.weight": INT8, "3.bias": INT8})
    failing = _QUANTIZE_CONFIG_HANDLER[Int8WeightOnlyConfig]

    def handler(module, config, *, parameter_name="weight"):
        if parameter_name == "bias":
            raise Interrupted
        return failing(module, config, parameter_name=parameter_name)

    _QUANTIZE_CONFIG_HANDLER[Int8WeightOnlyConfig] = handler
    try:
        assert_put_back(model, lambda m: door(m, table), Interrupted)
    finally:
        _QUANTIZE_CONFIG_HANDLER[Int8WeightOnlyConfig] = failing
    door(model, FqnToConfig({"0": CONFIG, "1": INT8}))
    assert quantized(model) == ["0.weight"] and "Int8Tensor" in type(model[1].weight).__name__


def test_arguments_of_quantize():
    model = chain()
    assert quantize(model, CONFIG) is model and len(quantized(model)) == 4
    with pytest.raises(ConfigError, match="filter_fn cannot be used with FqnToConfig"):
        quantize(model, FqnToConfig({"0": CONFIG}), lambda module, name: True)
    with pytest.raises(ConfigError, match="pass an IntScaleConfig"):
        quantize(model, INT8)


def test_default_of_a_table_names_nothing():
    model = Tail()
    quantize(model, FqnToConfig({"_default": CONFIG}))
    assert quantized(model) == ["layer.weight"]
    quantize(model, FqnToConfig({"lm_head": CONFIG}))
    assert quantized(model) == ["layer.weight", "lm_head.weight"]


# --- ways in which torchao is called --------------------------------------------------------------------------------


def renamed(names):
    """``quantize_`` with other names for its parameters, as another release might have it."""
    source = inspect.getsource(quant_api.quantize_)
    for old, new in names.items():
        source = re.sub(rf"\b{old}\b(?!=)", new, source)
    scope = dict(vars(quant_api))
    exec(source, scope)
    return scope["quantize_"]


def wrapper(model, config):
    return quant_api.quantize_(model, config)


COPIED = types.FunctionType(quantize_.__code__, dict(vars(quant_api)), "copied", quantize_.__defaults__)
WAYS = {
    "filter_fn renamed": renamed({"filter_fn": "selects"}),
    "model and config renamed": renamed({"model": "network", "config": "workflow"}),
    "wrapper": wrapper,
    "copied": COPIED,
    "partial": functools.partial(quantize_, filter_fn=None),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_plan_is_found(way, caplog):
    model = Tail()
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        way(model, CONFIG)
    assert quantized(model) == ["layer.weight"] and not caplog.records, "the output embedding stays"
    broken = Tail()
    broken.layer = chain(2)
    broken.layer[1].weight[0, 0] = float("inf")
    assert_put_back(broken, lambda m: way(m, CONFIG), WeightError, r"^layer\.1\.weight has NaN or Inf")


def copied_walk(model, handler, config):
    for child in model.children():
        if isinstance(child, nn.Linear):
            handler(child, config)


def test_modules_handed_over_one_by_one(caplog):
    """By code that we do not know: each is quantized, and what cannot be promised is said once, with the mend."""
    model, handler = Tail(), _QUANTIZE_CONFIG_HANDLER[IntScaleConfig]
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        copied_walk(model, handler, CONFIG)
    assert quantized(model) == ["layer.weight", "lm_head.weight"]
    (record,) = caplog.records
    assert "Not guaranteed" in record.message and "intscale_compile.quantize(model, config)" in record.message
    layer = nn.Linear(64, 64)
    layer.weight.data[0, 0] = float("nan")
    assert_put_back(layer, lambda m: handler(m, CONFIG), WeightError, "weight has NaN")


def test_torchao_without_the_functions_that_we_watch(monkeypatch, caplog):
    """Another release: said once, and quantize() needs none of them."""
    from intscale_compile.integrations import torchao_calls

    monkeypatch.delattr(quant_api, torchao_calls.WALK.attribute)
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        torchao_calls.watch_quantize_calls(None, IntScaleConfig, None)
    assert f"{torchao_calls.WALK.target} is not there in torchao" in caplog.text
    model = Tail()
    quantize(model, CONFIG)
    assert quantized(model) == ["layer.weight"]


# --- what is refused, or left alone -----------------------------------------------------------------------------------


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def integers(layer):
    layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    return layer


REFUSED = {
    "parametrization": (parametrizations.weight_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
    "weight_norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "pruning": (pruned, "prune.remove"),
    "lazy": (lambda layer: nn.LazyLinear(64), "call the model once"),
    "integers": (integers, "torch.int8"),
    "other library": (lambda layer: quantize_(nn.Sequential(layer), INT8) or layer, "another library's tensor"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
@door_of
def test_refused_before_anything_changes(door, name):
    change, mend = REFUSED[name]
    model = chain(3)
    model[1] = change(nn.Linear(64, 64).requires_grad_(False))
    assert_put_back(model, lambda m: door(m, CONFIG), WeightError, rf"^1\.weight .*{mend}")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mends_of_what_is_refused():
    undo = {
        "parametrization": lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
        "weight_norm": nn.utils.remove_weight_norm,
        "spectral_norm": nn.utils.remove_spectral_norm,
        "pruning": lambda layer: prune.remove(layer, "weight"),
        "lazy": lambda layer: layer(torch.ones(1, 64)),
    }
    model = nn.Sequential(*(REFUSED[name][0](nn.Linear(64, 64)) for name in undo))
    for layer, mend in zip(model, undo.values()):
        mend(layer)
    quantize(model, CONFIG)
    assert len(quantized(model)) == len(undo) and torch.isfinite(model(torch.randn(2, 64))).all()


def test_no_output_features():
    with pytest.warns(UserWarning, match="zero-element"):
        layer = nn.Linear(64, 0)
    model = nn.Sequential(nn.Linear(64, 64), layer)
    quantize(model, CONFIG)
    assert quantized(model) == ["0.weight"]
    named = lambda module, name: name == "1"  # noqa: E731
    assert_put_back(model, lambda m: quantize(m, CONFIG, named), WeightError, r"^1\.weight has shape \(0, 64\)")


# --- shared parameters, descriptions, marks -----------------------------------------------------------------------------


@door_of
def test_shared_parameter_is_quantized_once_and_stays_shared(door):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False)).requires_grad_(False)
    model[2].weight = model[0].weight
    wanted = IntScaleTensor.from_hp(model[0].weight, CONFIG)
    door(model, CONFIG)
    assert model[0].weight is model[2].weight and len(list(model.parameters())) == 1
    assert torch.equal(model[0].weight.dequantize(), wanted.dequantize())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    again, alone = io.BytesIO(), nn.Sequential(nn.Linear(64, 64, bias=False))
    alone[0].weight = model[0].weight
    torch.save(alone.state_dict(), again)
    assert file.tell() < again.tell() + 2000, "one copy of the data in the file"
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[2].weight


def test_filter_that_names_one_of_two_that_share():
    model = chain(2)
    model[1].weight = model[0].weight
    quantize(model, CONFIG, lambda module, name: name == "0")
    assert quantized(model) == ["0.weight"] and type(model[1].weight) is nn.Parameter


def test_pickle_deepcopy_and_torch_save():
    model = chain(1)
    quantize(model, CONFIG)
    text = "Linear(in_features=64, out_features=64, bias=True, weight=IntScaleTensor(shape=(64, 64), int4"
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(file, weights_only=False)]
    x = torch.randn(2, 64)
    for twin in copies:
        assert text in repr(twin) and twin[0].extra_repr.args[0] is twin[0]
        assert torch.equal(twin(x), model(x)) and vars(twin[0])[DECIDED]
    quiet = nn.Sequential(nn.Linear(64, 64, bias=False))
    assert "bias=False, weight=" in repr(intscale_compile.quantize(quiet, CONFIG))


def test_a_call_that_selects_nothing_decides_nothing():
    model = chain(1)
    quantize_(model, CONFIG, filter_fn=lambda module, name: False)
    assert DECIDED not in vars(model)
