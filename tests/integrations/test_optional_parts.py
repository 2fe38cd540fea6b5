"""Parts that a weight may have or not: zero points, a static activation scale, a rotation. Structure and files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, load_safetensors, save_pretrained, save_safetensors
from intscale_compile.errors import CheckpointError, UnsupportedOpError, WeightError
from intscale_compile.saving.checkpoint import rebuild_tensor
from tests.support.tensors import PACKINGS, assert_same, make
from tests.tensors.test_tensor import PLAIN_2D, ROWS_2D, STACK

QUICK = IntScaleConfig(scale_search="absmax")
KINDS = ("zero", "static", "rotation", "all")
PARTS = ("zero_point", "act_pre_scale")


def with_parts(tensor: IntScaleTensor, kind: str, seed: int = 0) -> IntScaleTensor:
    """``tensor`` with random zero points, an activation scale, a rotation, or all of them."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("zero", "all"):
        plain = tensor.to_packing("plain")
        zero = torch.randint(-8, 8, plain.scale.shape, generator=generator, dtype=torch.int8)
        tensor = plain.replaced(zero_point=zero).to_packing(tensor.packing_format)
    if kind in ("static", "all"):
        shape = (*tensor.qdata.shape[:-2], 1, 1)
        tensor = tensor.with_activation_scale(torch.rand(shape, generator=generator) + 0.1)
    return tensor.with_rotation(8) if kind in ("rotation", "all") else tensor


def assert_identical(found: IntScaleTensor, wanted: IntScaleTensor) -> None:
    assert repr(found) == repr(wanted) and found.data_names == wanted.data_names
    for name in wanted.data_names:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


# --- structure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ROWS_2D)
def test_matrix_operator(name, packing):
    weight = with_parts(make(200, 400, packing=packing), "zero")
    assert_same(ROWS_2D[name](weight), ROWS_2D[name](weight.dequantize()))


@pytest.mark.parametrize("name", PLAIN_2D)
def test_matrix_operator_that_needs_plain_packing(name):
    weight = with_parts(make(200, 400), "zero")
    assert_same(PLAIN_2D[name](weight), PLAIN_2D[name](weight.dequantize()))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", STACK)
def test_stack_operator(name, packing):
    weight = with_parts(make(3, 128, 200, packing=packing), "zero")
    assert_same(STACK[name](weight), STACK[name](weight.dequantize()))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_survive(kind, group_size):
    weight = with_parts(make(130, 600, group_size=group_size), kind).validate()
    for same in (weight.clone(), weight.detach(), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert_identical(same, weight)
    assert_identical(weight.to_packing("tiled").validate().to_packing("plain"), weight)
    assert_identical(weight.to(torch.bfloat16), weight.replaced(dtype=torch.bfloat16))
    part = weight[64:]
    assert part.rotation == weight.rotation and part.act_pre_scale is weight.act_pre_scale
    assert torch.equal(part.dequantize(), weight.dequantize()[64:])
    assert torch.equal(weight.t().dequantize(), weight.dequantize().t())
    assert_same(torch.cat([weight[:64], weight[64:]]), weight.dequantize())
    target = with_parts(make(130, 600, group_size=group_size), kind, seed=1)
    assert_identical(target.copy_(weight), weight)


@pytest.mark.parametrize("kind", ["static", "all"])
def test_scales_of_experts(kind):
    stack = with_parts(make(3, 64, 200), kind)
    assert torch.equal(stack[1].act_pre_scale, stack.act_pre_scale[1])
    assert torch.equal(stack[1:].act_pre_scale, stack.act_pre_scale[1:])
    assert stack[:, :64].act_pre_scale is not None and stack[:, :32].act_pre_scale.shape == (3, 1, 1)
    assert torch.equal(torch.cat([stack, stack]).act_pre_scale, stack.act_pre_scale.repeat(2, 1, 1))
    with pytest.raises(UnsupportedOpError, match="one per expert"):
        stack.view(-1, 200)


def test_cat_of_symmetric_and_asymmetric_rows():
    """The others get zero points of 0; in either packing and order."""
    for packing in PACKINGS:
        one, other = make(64, 200, packing=packing), with_parts(make(64, 200, packing=packing), "zero")
        for parts in ([one, other], [other, one]):
            assert_same(torch.cat(parts), torch.cat([p.dequantize() for p in parts]))
    assert torch.cat([one, other]).zero_point is not None and torch.cat([one, one]).zero_point is None
    stacks = make(2, 64, 200), with_parts(make(1, 64, 200), "zero")
    assert_same(torch.cat(stacks), torch.cat([s.dequantize() for s in stacks]))


def test_what_does_not_fit_together():
    weight = make(64, 256)
    for other in (with_parts(weight, "static"), with_parts(weight, "rotation")):
        with pytest.raises(UnsupportedOpError, match="static and with dynamic|differ in rotation"):
            torch.cat([weight, other])
        with pytest.raises(UnsupportedOpError, match="copy_ from"):
            weight.copy_(other)
    with pytest.raises(UnsupportedOpError, match="different static activation scales"):
        torch.cat([weight.with_activation_scale(0.5), weight.with_activation_scale(0.25)])
    with pytest.raises(UnsupportedOpError, match="cut through blocks of rotation=256"):
        weight.with_rotation(256)[:, :128]
    assert weight.with_rotation(128)[:, 128:].rotation == 128


def test_rotation_is_undone():
    """``dequantize`` gives the weight of the unrotated activation, against a dense Hadamard matrix."""
    weight = make(64, 256)
    rotated = weight.with_rotation(64)
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < 64:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    blocks = torch.block_diag(*[hadamard / 8] * 4)
    torch.testing.assert_close(rotated.dequantize(), weight.dequantize() @ blocks, rtol=1e-5, atol=1e-6)
    assert rotated.dequantize(torch.float16).dtype == torch.float16


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), torch.ones(2)])
def test_bad_activation_scale(scale):
    with pytest.raises(WeightError, match="activation scale"):
        make(64, 256).with_activation_scale(scale)


@pytest.mark.parametrize("size", [1, 3, 512, -8, 8.0, True])
def test_bad_rotation(size):
    with pytest.raises(WeightError, match="does not fit 256 input features"):
        make(64, 256).with_rotation(size)


def test_bound_with_zero_points():
    """127 * sum of scale * |code - zero point|, padding not counted."""
    weight = with_parts(make(70, 300, group_size=128), "zero")
    distance = (weight.codes.long() - weight.zero_point.long().repeat_interleave(128, 1)[:, :300]).abs()
    scaled = distance * weight.scale.long().repeat_interleave(128, 1)[:, :300]
    assert torch.equal(weight.accumulator_bound(), 127 * scaled.sum(-1))
    assert torch.equal(weight.to_packing("tiled").accumulator_bound(), weight.accumulator_bound())


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_file(kind, weights_only):
    for packing in PACKINGS:
        weight, file = with_parts(make(70, 200, packing=packing), kind), io.BytesIO()
        torch.save(weight, file)
        file.seek(0)
        assert_identical(torch.load(file, weights_only=weights_only), weight)


@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_file_from_before_these_parts(weights_only):
    """A pickled state without them loads, and means what it meant."""
    weight, file = make(70, 200), io.BytesIO()
    old = weight.detach()
    for name in (*PARTS, "rotation"):
        del old.__dict__[name]
    torch.save(old, file)
    file.seek(0)
    found = torch.load(file, weights_only=weights_only)
    assert found.zero_point is None and found.activation_scale is None and found.rotation == 0
    assert_identical(found, weight)


def test_parts_of_a_file_from_before():
    weight = make(70, 200)
    parts = {name: getattr(weight, name) for name in (*weight.tensor_data_names, *weight.tensor_attribute_names)}
    assert_identical(rebuild_tensor(**parts), weight)


BROKEN = {
    "zero point dtype": (lambda t: t.replaced(zero_point=t.zero_point.int()), "zero points are torch.int32"),
    "zero point range": (lambda t: t.replaced(zero_point=t.zero_point + 10), "zero points from"),
    "zero point shape": (lambda t: t.replaced(zero_point=t.zero_point[:1]), "zero_point has shape"),
    "no tensor": (lambda t: t.replaced(zero_point=3), "zero_point is int"),
    "activation scale": (lambda t: t.replaced(act_pre_scale=t.act_pre_scale * 0), "static activation scale is not"),
    "activation scale shape": (lambda t: t.replaced(act_pre_scale=torch.ones(2, 1)), "act_pre_scale has shape"),
    "activation scale dtype": (lambda t: t.replaced(act_pre_scale=t.act_pre_scale.double()), "torch.float64"),
    "rotation": (lambda t: t.replaced(rotation=24), "rotation=24 does not fit"),
    "rotation too large": (lambda t: t.replaced(rotation=128), "rotation=128 does not fit 200"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_part(name):
    change, message = BROKEN[name]
    file = io.BytesIO()
    torch.save(change(with_parts(make(70, 200), "all")), file)
    file.seek(0)
    with pytest.raises(CheckpointError, match=message):
        torch.load(file, weights_only=True)


def mixed_model() -> nn.Sequential:
    """One layer of every kind, and one without optional parts."""
    model = nn.Sequential(*(nn.Linear(200, 70, bias=False) for _ in range(len(KINDS) + 1)))
    quantize_(model, QUICK)
    for layer, kind in zip(model, KINDS):
        layer.weight = nn.Parameter(with_parts(layer.weight.data, kind), requires_grad=False)
    return model


def test_safetensors(tmp_path):
    model = mixed_model()
    save_safetensors(model, tmp_path / "m.safetensors")
    state = load_safetensors(tmp_path / "m.safetensors")
    for name, weight in model.state_dict().items():
        assert_identical(state[name], weight)


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_from_pretrained(size, tmp_path):
    """transformers, one file and many; layers differ in what they have."""
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, vocab_size=96)
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    quantize_(model, QUICK)
    quantized = [(n, p) for n, p in model.named_parameters() if isinstance(p, IntScaleTensor)]
    assert len(quantized) == 14
    for i, (name, weight) in enumerate(quantized):
        kind = (*KINDS, "none")[i % (len(KINDS) + 1)]
        owner, _, leaf = name.rpartition(".")
        changed = nn.Parameter(with_parts(weight.data, kind, seed=i), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, changed)
    save_pretrained(model, tmp_path, max_shard_size=size)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, _ in quantized:
        assert_identical(again.get_parameter(name).data, model.get_parameter(name).data)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
