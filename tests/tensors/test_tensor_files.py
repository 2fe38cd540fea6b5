"""Quantized weights in modules and files: state dictionaries, pickle, ``torch.save``, shared memory."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intscale_compile import IntScaleTensor
from tests.support.tensors import make, module

# --- modules, files -------------------------------------------------------------------------------------------------


def test_repr_fits_a_line_and_says_everything():
    text = repr(make(3, 128, 200, packing="tiled", group_size=64, scale_bits=5, dtype=torch.bfloat16).mT)
    assert text == (
        "IntScaleTensor(shape=(3, 200, 128), int4, group_size=64, scale_bits=5, "
        "tiled, transposed, dtype=torch.bfloat16, device=cpu)"
    )
    assert "int8, per channel" in repr(make(64, 128, weight_bits=8))
    assert repr(nn.Parameter(make(64, 128), requires_grad=False)).count("\n") <= 1


def test_module_to_dtype_and_device():
    layer, x = module(), torch.randn(3, 256)
    dense = layer.weight.dequantize()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16 and isinstance(layer.weight, IntScaleTensor)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.weight.dequantize(torch.float32), dense), "claiming another dtype must not change the data"
    assert torch.equal(layer.weight.dequantize(), dense.to(torch.bfloat16))
    layer.to("meta")
    assert layer.weight.device.type == "meta" and layer.weight.qdata.device.type == "meta"
    assert layer.weight.shape == (64, 256)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    source, target = module(), module()
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(target.weight.dequantize(), source.weight.dequantize())
    assert (target.weight.qdata.data_ptr() == source.weight.qdata.data_ptr()) is assign


def test_state_dict_assigned_to_a_plain_module_and_refused_without_assign():
    source, x = module(), torch.randn(2, 256)
    plain = nn.Linear(256, 64)
    with pytest.raises(RuntimeError, match="IntScaleTensor"):
        plain.load_state_dict(source.state_dict())
    plain.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(plain(x), source(x))
    with torch.device("meta"):
        empty = nn.Linear(256, 64)
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty(x), source(x))


KINDS = [
    {},
    {"packing": "tiled"},
    {"weight_bits": 8},
    {"amplifier": 1024},
    {"dtype": torch.bfloat16},
    {"group_size": -1},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pickle(kind):
    weight = make(3, 70, 300, **kind).mT
    again = pickle.loads(pickle.dumps(weight))
    assert repr(again) == repr(weight) and torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_torch_save_and_load_with_weights_only(kind, mmap, tmp_path):
    weight = make(70, 300, **kind)
    torch.save({"w": weight, "p": nn.Parameter(weight, requires_grad=False)}, tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt", weights_only=True, mmap=mmap)
    for again in loaded.values():
        assert isinstance(again, IntScaleTensor) and repr(again) == repr(weight)
        for name in weight.tensor_data_names:
            assert torch.equal(getattr(again, name), getattr(weight, name))
    x = torch.randn(2, 300)
    assert torch.equal(F.linear(x, loaded["w"]), F.linear(x, weight))


def test_saved_file_names_the_public_class():
    """Files must stay readable when modules move inside the package."""
    buffer = io.BytesIO()
    torch.save(make(64, 128), buffer)
    assert (
        b"intscale_compile\nIntScaleTensor" in buffer.getvalue()
        and b"intscale_compile.tensors.intscale_tensor" not in buffer.getvalue()
    )


def test_share_memory():
    """The wrapper has no storage of its own: sharing must reach the parts (and must not crash)."""
    layer = module().share_memory()
    assert all(getattr(layer.weight, name).is_shared() for name in layer.weight.tensor_data_names)
