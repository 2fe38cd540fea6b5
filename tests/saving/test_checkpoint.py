"""Saving and loading: bit-equal round trips, also in a new process, and damaged files that say what is wrong with
them.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor, load_safetensors, save_safetensors
from intscale_compile.errors import CheckpointError
from intscale_compile.saving.checkpoint import rebuild_tensor
from tests.support.saved import QUICK, assert_same_state, model_of

CONFIGS = [
    QUICK,
    IntScaleConfig(group_size=32, scale_bits=8, scale_search="absmax"),
    IntScaleConfig(weight_bits=8, scale_search="absmax"),
    IntScaleConfig(amplifier=1024, scale_search="absmax"),
    IntScaleConfig(group_size=-1, packing_format="tiled", scale_search="absmax"),
]


# --- safetensors files of our own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_safetensors_round_trip(config, tmp_path):
    model, x = model_of(config), torch.randn(3, 200)
    save_safetensors(model, tmp_path / "m.safetensors")
    state = load_safetensors(tmp_path / "m.safetensors")
    assert_same_state(state, model.state_dict())
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(200, 70), nn.LayerNorm(70), nn.Linear(70, 32, bias=False))
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh(x), model(x))


class Unusual(nn.Module):
    """Names without a dot, a stack of experts, a transposed weight, a buffer, tied and non-contiguous tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(IntScaleTensor.from_hp(torch.randn(64, 64), QUICK), requires_grad=False)
        self.cls_token = nn.Parameter(torch.randn(1, 64))
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(
            IntScaleTensor.from_hp(torch.randn(3, 64, 40).bfloat16(), QUICK), requires_grad=False
        )
        self.conv = nn.Module()
        self.conv.weight = nn.Parameter(IntScaleTensor.from_hp(torch.randn(64, 40), QUICK).t(), requires_grad=False)
        self.embed, self.head = nn.Embedding(10, 64), nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(6).reshape(2, 3).t())


def test_safetensors_of_an_unusual_model(tmp_path):
    model = Unusual()
    save_safetensors(model, tmp_path / "m.safetensors")
    assert_same_state(load_safetensors(tmp_path / "m.safetensors"), model.state_dict())


def test_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        load_safetensors("/nowhere/m.safetensors")


# --- damaged files --------------------------------------------------------------------------------------------------


def rewrite(path, change):
    """Read a safetensors file, let ``change(tensors, header)`` alter it, write it back; headers are decoded for it."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["0.weight"])
    replaced = change(tensors, header)
    metadata["0.weight"] = json.dumps(header if replaced is None else replaced)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def set_entry(part, value, dtype=None):
    def change(tensors, header):
        tensor = tensors[f"0._weight_{part}"] if dtype is None else tensors[f"0._weight_{part}"].to(dtype)
        tensor.view(-1)[5] = value
        tensors[f"0._weight_{part}"] = tensor

    return change


def set_part(part, make):
    def change(tensors, header):
        tensors[f"0._weight_{part}"] = make(tensors[f"0._weight_{part}"])

    return change


def set_field(**fields):
    return lambda tensors, header: header["_data"].update(fields)


DAMAGE = {
    "zero scale": (set_entry("scale", 0), "a group scale is 0"),
    "negative scale": (set_entry("scale", -3, torch.int16), "a group scale is -3"),
    "scale over its bits": (set_entry("scale", 16), "a group scale is 16, over the 4 bits"),
    "scale bits too small": (set_field(scale_bits=3), "over the 3 bits declared"),
    "scale bits zero": (set_field(scale_bits=0), "scale_bits is 0"),
    "scale bits text": (set_field(scale_bits="4"), "scale_bits is '4'"),
    "scale bits huge": (set_field(scale_bits=64), "scale_bits is 64"),
    "nan row scale": (set_entry("per_tensor_scale", float("nan")), "a row scale is not a positive finite"),
    "infinite row scale": (set_entry("per_tensor_scale", float("inf")), "a row scale is not a positive finite"),
    "negative row scale": (set_entry("per_tensor_scale", -1.0), "a row scale is not a positive finite"),
    "half row scale": (set_part("per_tensor_scale", torch.Tensor.half), "row scales are torch.float16"),
    "flat row scale": (set_part("per_tensor_scale", torch.Tensor.flatten), "per_tensor_scale has shape \\(70,\\)"),
    "short codes": (set_part("qdata", lambda t: t[:-1]), "qdata has shape \\(69, 128\\) where 70 x 200"),
    "narrow codes": (set_part("qdata", lambda t: t[:, :-64]), "qdata has shape \\(70, 64\\)"),
    "flat codes": (set_part("qdata", torch.Tensor.flatten), "block_size|dimensions|shape"),
    "float codes": (set_part("qdata", torch.Tensor.float), "codes are torch.float32"),
    "int8 codes": (set_part("qdata", lambda t: t.view(torch.int8)), "8-bit codes with group scales"),
    "float scales": (set_part("scale", torch.Tensor.float), "group scales are torch.float32"),
    "few scales": (set_part("scale", lambda t: t[:, :1]), "scale has shape \\(70, 1\\)"),
    "smaller block": (
        set_field(block_size=[1, 64]),
        "scale has shape \\(70, 2\\) where .* groups of 64 need \\(70, 4\\)",
    ),
    "unknown block": (set_field(block_size=[1, 100]), "group size 100 is not one of"),
    "short block": (set_field(block_size=[128]), "block_size is \\[128\\]"),
    "empty block": (set_field(block_size=[]), "block_size is \\[\\]"),
    "no block": (set_field(block_size=None), "block_size is None"),
    "more features": (set_field(in_features=300), "where 70 x 300 weights"),
    "fewer rows": (set_field(out_features=64), "where 64 x 200 weights"),
    "no features": (set_field(in_features=0), "in_features is 0"),
    "negative features": (set_field(in_features=-200), "in_features is -200"),
    "text features": (set_field(in_features="200"), "in_features is '200'"),
    "enormous features": (set_field(in_features=2**70), "in_features is 1180591620717411303424"),
    "other packing": (set_field(packing_format="tiled"), "qdata has shape"),
    "unknown packing": (set_field(packing_format="marlin"), "packing format 'marlin' is unknown"),
    "transposed text": (set_field(transposed="no"), "transposed is 'no'"),
    "unknown dtype": (set_field(dtype={"_type": "torch.dtype", "_data": "float12"}), "float12"),
    "not a dtype": (set_field(dtype={"_type": "torch.dtype", "_data": "nn"}), "cannot be rebuilt"),
    "text dtype": (set_field(dtype="float32"), "cannot be rebuilt"),
    "integer dtype": (set_field(dtype={"_type": "torch.dtype", "_data": "int64"}), "claims the dtype torch.int64"),
    "missing field": (lambda tensors, header: header["_data"].pop("scale_bits") and None, "lacks \\['scale_bits'\\]"),
    "unknown field": (set_field(zero_points=0), "unknown \\['zero_points'\\]"),
    "zero point no tensor": (set_field(zero_point=0), "zero_point is int, not a tensor"),
    "rotation of 3": (set_field(rotation=3), "rotation=3 does not fit"),
    "rotation a list": (set_field(rotation=[64]), "rotation=\\[64\\] does not fit"),
    "missing part": (lambda tensors, header: tensors.pop("0._weight_scale") is None or None, "data missing"),
    "extra part": (lambda tensors, header: tensors.update({"0._weight_extra": torch.zeros(2)}), "data missing|extra"),
    "extra tensor": (lambda tensors, header: tensors.update({"9.weight": torch.zeros(2)}), "9.weight"),
    "unknown class": (lambda tensors, header: header.update(_type="OtherTensor"), "OtherTensor"),
    "another class": (lambda tensors, header: header.update(_type="Int8Tensor"), "header cannot be read"),
    "no data": (lambda tensors, header: header.pop("_data") and None, "_data"),
    "not an object": (lambda tensors, header: [1, 2], "header cannot be read"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "good.safetensors"
    torch.manual_seed(0)
    save_safetensors(model_of(), path)
    return path


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file(name, saved, tmp_path):
    """Our type, one line, with the file, the tensor and what is wrong; never a wrong tensor and never another error."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(saved.read_bytes())
    change, message = DAMAGE[name]
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_safetensors(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert "0.weight" in text or name == "extra tensor"


def test_rewriting_alone_does_no_damage(saved, tmp_path):
    """The control of the test above."""
    path = tmp_path / "good.safetensors"
    path.write_bytes(saved.read_bytes())
    rewrite(path, lambda tensors, header: None)
    assert_same_state(load_safetensors(path), load_safetensors(saved))


def test_overflow_that_only_the_codes_show(tmp_path):
    """Shapes and ranges are fine, but the accumulator of row 0 could leave int32."""
    tensor = IntScaleTensor.from_hp(torch.ones(2, 16384), IntScaleConfig(scale_bits=8, scale_search="absmax"))
    tensor.qdata.fill_(0xFF if tensor.qdata.dtype == torch.uint8 else -1)  # the largest code, 7 or 15 less 8
    tensor.scale.fill_(255)
    save_safetensors(nn.ParameterDict({"w": nn.Parameter(tensor, requires_grad=False)}), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="w: the int32 accumulator could reach"):
        load_safetensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_truncated_file(keep, saved, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="bad.safetensors: "):
        load_safetensors(path)


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {"tensor_names": "not json"}, {"tensor_names": "5"}, {"tensor_names": '["0.weight"]'}],
)
def test_header_that_is_not_ours(metadata, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file({"0.weight": torch.zeros(4)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="bad.safetensors: "):
        load_safetensors(path)


BROKEN_TENSORS = {
    "zero scale": (lambda t: t.replaced(scale=torch.zeros_like(t.scale)), "a group scale is 0"),
    "short codes": (lambda t: t.replaced(qdata=t.qdata[:-1]), "qdata has shape"),
    "block size": (lambda t: t.replaced(block_size=[1, 64]), "scale has shape"),
    "in_features": (lambda t: t.replaced(in_features=900), "70 x 900"),
    "scale bits": (lambda t: t.replaced(scale_bits=2), "over the 2 bits"),
    "row scale": (lambda t: t.replaced(per_tensor_scale=t.per_tensor_scale * float("nan")), "row scale"),
    "dtype": (lambda t: t.replaced(dtype=torch.int32), "claims the dtype torch.int32"),
}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_damaged_torch_file(name, weights_only, tmp_path):
    change, message = BROKEN_TENSORS[name]
    torch.save(change(IntScaleTensor.from_hp(torch.randn(70, 200), QUICK)), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        torch.load(tmp_path / "w.pt", weights_only=weights_only)


@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_file_holds_nothing_that_follows_from_the_rest(weights_only, tmp_path):
    """What ``__tensor_flatten__`` keeps is not stored, and a file that brings it along is not believed."""
    weight = IntScaleTensor.from_hp(torch.randn(64, 256))
    kept = weight.__tensor_flatten__()
    torch.save(weight, tmp_path / "weight.pt")
    assert "_flat" not in torch.load(tmp_path / "weight.pt", weights_only=weights_only).__dict__

    weight._set_checked_state({**weight.__dict__, "_flat": (["qdata"], {})})
    assert weight.__tensor_flatten__() == kept


def test_torch_file_that_lacks_a_part(tmp_path):
    tensor = IntScaleTensor.from_hp(torch.randn(70, 200), QUICK)
    del tensor.scale_bits
    torch.save(tensor, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="lacks \\['scale_bits'\\]"):
        torch.load(tmp_path / "w.pt", weights_only=True)


def test_rebuild_checks_what_it_gets():
    tensor = IntScaleTensor.from_hp(torch.randn(70, 200), QUICK)
    parts = {name: getattr(tensor, name) for name in (*tensor.tensor_data_names, *tensor.tensor_attribute_names)}
    assert torch.equal(rebuild_tensor(**parts).dequantize(), tensor.dequantize())
    with pytest.raises(CheckpointError, match="lacks \\['qdata'\\]"):
        rebuild_tensor(**{name: part for name, part in parts.items() if name != "qdata"})
    with pytest.raises(CheckpointError, match="a group scale is 0"):
        rebuild_tensor(**{**parts, "scale": parts["scale"] * 0})
