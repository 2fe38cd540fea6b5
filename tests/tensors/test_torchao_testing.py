"""What torchao asks of a tensor subclass in its own test classes (``torchao.testing.utils``), asked of ours.

Those classes need a package that we do not install, and devices that CI does not have; each situation is here once. Of their
cases, all of Basic and Compile hold; of TensorParallel, ``tests/parallel`` holds what we support (quantize first, then
divide). What we refuse on purpose:

* rows or features cut where packing does not allow it (``narrow`` along tiles, ``chunk`` of features): rearranging codes
  would be a copy, and a view is what was asked for;
* ``cat`` of two weights along input features: every part has row scales of its own, so no exact result exists. That is what
  the mixture of experts of Llama 4 asks of two checkpoints after it sets one scale for both;
* reshaping a transposed stack: a view of packed codes cannot follow.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import UnsupportedOpError
from tests.support.moe import sqnr

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INT4 = IntScaleConfig(scale_search="absmax")
CONFIG = IntScaleConfig(weight_bits=8)  # their bound of 40 dB is one for eight bits


def quantized(*shape, dtype=torch.float32, config=CONFIG):
    return IntScaleTensor.from_hp(torch.randn(*shape, dtype=dtype), config)


# --- Basic --------------------------------------------------------------------------------------------------------------


def test_flatten_and_unflatten():
    weight = quantized(16, 128)
    names, attributes = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    again = IntScaleTensor.__tensor_unflatten__(parts, attributes, weight.size(), weight.stride())
    assert torch.equal(again, weight) and torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_move_transpose_and_linear(dtype):
    dense = torch.randn(16, 128, dtype=dtype)
    weight = IntScaleTensor.from_hp(dense, CONFIG)
    assert weight.dtype == dtype and weight.shape == (16, 128)
    assert weight.t().shape == (128, 16)
    for moved in (weight.to("cpu"), weight.to(device="cpu"), weight.cpu()):
        assert torch.equal(moved, weight)
    x = torch.randn(32, 128, dtype=dtype)
    linear = torch.nn.functional.linear
    assert sqnr(linear(x, dense), linear(x, weight)) > 39


# --- Compile ------------------------------------------------------------------------------------------------------------


def test_in_and_out_of_a_compiled_function():
    """A weight as input and output, and as input only, with torch's own backend."""
    weight = quantized(16, 128)
    torch._dynamo.reset()
    same, values = torch.compile(lambda tensor: (tensor, tensor.dequantize()))(weight)
    assert type(same) is IntScaleTensor and torch.equal(same, weight)
    assert type(values) is torch.Tensor and torch.equal(values, weight.dequantize())


@pytest.mark.slow
def test_made_in_a_compiled_function():
    dense = torch.randn(16, 128)
    torch._dynamo.reset()
    made = torch.compile(lambda plain: IntScaleTensor.from_hp(plain, CONFIG))(dense)
    assert type(made) is IntScaleTensor
    assert sqnr(IntScaleTensor.from_hp(dense, CONFIG).dequantize(), made.dequantize()) > 50


@pytest.mark.generated
def test_compiled_linear():
    dense, x = torch.randn(16, 128), torch.randn(32, 128)
    layer = nn.Linear(128, 16, bias=False)
    layer.weight = nn.Parameter(IntScaleTensor.from_hp(dense, CONFIG), requires_grad=False)
    torch._dynamo.reset()
    assert sqnr(x @ dense.t(), torch.compile(layer)(x)) > 40


# --- Integration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [INT4, CONFIG], ids=["int4", "int8"])
def test_narrow_and_copy_as_vllm_loads(config):
    """A shard of a loaded weight is written into the same rows of a parameter."""
    target, source = nn.Linear(256, 256), nn.Linear(256, 256)
    for layer in (target, source):
        quantize_(layer, config)
    for start in (0, 128):
        rows, wanted = target.weight.data.narrow(0, start, 128), source.weight.narrow(0, start, 128)
        assert not torch.equal(rows, wanted)
        rows.copy_(wanted)
        assert torch.equal(rows, wanted)
    assert torch.equal(target.weight.data, source.weight.data)


def test_narrow_keeps_the_rank_of_every_part():
    weight = quantized(64, 256, config=INT4)
    for part in (weight.narrow(1, 0, 256), weight.narrow(1, 0, 128), weight.narrow(0, 0, 16)):
        assert {getattr(part, name).dim() for name in part.data_names} == {2}


def test_one_expert_of_a_stack_and_chunks():
    stack = quantized(4, 64, 128)
    assert torch.equal(stack[0].dequantize(), stack.dequantize()[0])
    weight = quantized(64, 256)
    assert torch.equal(torch.cat(weight.chunk(2, 0)), weight)


def test_experts_divided_and_joined():
    """The steps of Llama 4's checkpoints that have a meaning: experts merged into rows and split again."""
    stack = quantized(2, 64, 128)
    rows = stack.reshape(-1, 128)
    assert rows.shape == (128, 128) and torch.equal(rows.unflatten(0, (2, -1)), stack)


# --- refusals that we want ------------------------------------------------------------------------------------------------

REFUSED = {
    "joined along features": (lambda w: torch.cat(w.chunk(2, 1), 1), "row scales of its own"),
    "rows within a tile": (lambda w: w.to_packing("tiled").narrow(0, 8, 16), "not whole tiles"),
    "features within a group": (lambda w: w.narrow(1, 8, 16), "not multiples of"),
    "transposed and reshaped": (lambda w: w.t().reshape(-1), "only experts and output rows can be merged or split"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    run, message = REFUSED[name]
    with pytest.raises(UnsupportedOpError, match=message):
        run(quantized(128, 256, config=INT4))
