"""Readers of stored models, given damaged files. Whatever was changed, a reader ends in one of

own error         ``IntScaleError``; ``FileNotFoundError`` where a file was taken away
equal             what was stored, to the bit
in-range change   data that contradict nothing, in a tensor of the same names, shapes and layout: the checksums tell

and anything else fails: a foreign exception, another layout, a tensor that does not hold what it says. The same examples
every time; ``-m slow`` tries more of them.
"""

from __future__ import annotations

import io
import json
import logging
import struct
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

from intscale_compile import (
    IntScaleConfig,
    IntScaleTensor,
    load_safetensors,
    save_pretrained,
    save_safetensors,
    verify_checkpoint,
)
from intscale_compile import from_quantized as load_foreign
from intscale_compile.errors import CheckpointError, IntScaleError
from intscale_compile.saving.shard_reading import read_shards
from tests.support.damage import JUNK, SafetensorsFile, changed_folder, damaged
from tests.support.quantized_checkpoints import (
    awq_parts,
    compressed_parts,
    compressed_scheme,
    gptq_parts,
    quantize_groups,
    tiny_llama,
    write_checkpoint,
)

transformers = pytest.importorskip("transformers")

OWN = (IntScaleError, FileNotFoundError)


# --- what comes of it ---------------------------------------------------------------------------------------------------


def replace(path, content):
    """Write a new file: tensors of the one before may still be views of it."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def layout(tensor):
    return repr(tensor) if isinstance(tensor, IntScaleTensor) else ""


def parts_of(tensor):
    return [getattr(tensor, name) for name in tensor.data_names] if isinstance(tensor, IntScaleTensor) else [tensor]


def same(one, two):
    if one.shape != two.shape or one.dtype != two.dtype or layout(one) != layout(two):
        return False
    return all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(parts_of(one), parts_of(two)))


def as_bytes(part):
    """NaN is equal to itself here."""
    return part.contiguous().clone().reshape(-1).view(torch.uint8)


def judge(found, wanted, path, sealed):
    """Assert that a state dict that was read is equal, or an in-range change that the checksums tell."""
    assert set(found) == set(wanted)
    if all(same(found[name], wanted[name]) for name in wanted):
        return
    for tensor in found.values():
        if isinstance(tensor, IntScaleTensor):
            tensor.validate()
    if sealed:  # whatever was changed, the headers were not
        for name, tensor in wanted.items():
            assert isinstance(found[name], IntScaleTensor) == isinstance(tensor, IntScaleTensor)
            assert layout(found[name]) == layout(tensor), name
        with pytest.raises(CheckpointError):
            verify_checkpoint(path)


def has_checksums(content: bytes) -> bool:
    try:
        return '"tensors"' in SafetensorsFile(content).header["__metadata__"]["intscale"]
    except (KeyError, ValueError, TypeError, struct.error):
        return False


# --- files of save_safetensors --------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Every part that may be absent is in one of the weights."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        quick = IntScaleConfig(group_size=32, scale_search="absmax")
        weights = {
            "plain": IntScaleTensor.from_hp(random(10, 72), quick).with_activation_scale(0.5),
            "tiled": IntScaleTensor.from_hp(
                random(10, 64), IntScaleConfig(packing_format="tiled", scale_search="absmax")
            ),
            "eight": IntScaleTensor.from_hp(random(8, 40), IntScaleConfig(weight_bits=8)).t(),
            "experts": IntScaleTensor.from_hp(random(2, 8, 64), quick).with_rotation(16),
        }
        codes = torch.randint(-8, 8, (8, 64), dtype=torch.int8, generator=generator)
        zero = torch.randint(-8, 8, (8, 2), dtype=torch.int8, generator=generator)
        ordered = IntScaleTensor.from_codes(codes, random(8, 2).abs() + 0.1, group_size=32, zero_point=zero)
        weights["ordered"] = ordered.with_input_order(torch.randperm(64, generator=generator))
        for name, weight in weights.items():
            module = nn.Module()
            module.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, module)
        self.bias = nn.Parameter(random(5))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    save_safetensors(Small(), path)
    return path


READERS = {"load_safetensors": load_safetensors, "read_shards": lambda path: read_shards(path, {}, 0, 1)}


def examples(few: int, many: int):
    """The number of examples: few, or, with the slow tests, many."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def explore(strategy, test, count):
    """``test(example)`` for the same ``count`` examples every time."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    options = settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)
    options(given(strategy)(test))()


@examples(60, 4000)
@pytest.mark.parametrize("reader", READERS)
def test_files_of_our_own(reader, count, small, tmp_path):
    path = tmp_path / "m.safetensors"  # tensors are views of the file that they were read from: not of this one
    content, wanted = small.read_bytes(), READERS[reader](small)

    def test(changed):
        replace(path, changed)
        try:
            found = READERS[reader](path)
        except OWN as error:
            assert "\n" not in str(error)
            return
        judge(found, wanted, path, has_checksums(changed))

    explore(damaged(content), test, count)


@examples(40, 2000)
def test_shards_of_damaged_files(count, small, tmp_path):
    """Half of each weight, as one rank of two reads it."""
    path = tmp_path / "m.safetensors"
    divided = {"plain.weight": (-2, 1, 1), "ordered.weight": (-2, 1, 1), "experts.weight": (-2, 1, 1)}
    wanted = read_shards(small, divided, 1, 2)

    def test(changed):
        replace(path, changed)
        try:
            found = read_shards(path, divided, 1, 2)
        except OWN:
            return
        judge(found, wanted, path, has_checksums(changed))

    explore(damaged(small.read_bytes()), test, count)


@st.composite
def changed_state(draw, tensor):
    """The stored state of a tensor with one entry exchanged."""
    state = dict(tensor.__getstate__())
    name = draw(st.sampled_from(sorted(state)))
    part = state[name]
    if draw(st.booleans()) and isinstance(part, torch.Tensor):
        flipped = -part if part.is_floating_point() else part ^ 1
        changes = [
            part[:1],
            part.float(),
            part.mT,
            part[None],
            part.flatten(),
            part * 0,
            part[:0],
            flipped,
            part.to_sparse(),
        ]
        state[name] = draw(st.sampled_from(changes))
    else:
        state[name] = draw(st.sampled_from([*JUNK, "tiled", [1, 64], torch.float16, torch.zeros(2)]))
    return state


@examples(100, 3000)
def test_torch_load(count):
    """The state within a whole zip file; a damaged zip is torch's to refuse."""
    tensors = [module.weight.data for module in Small().children()]

    def test(example):
        tensor, state = example
        buffer = io.BytesIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(IntScaleTensor, "__getstate__", lambda self: state)
            torch.save(tensor, buffer)
        buffer.seek(0)
        try:
            found = torch.load(buffer, weights_only=True)
        except OWN:
            return
        found.validate()
        assert found.shape == tensor.shape

    explore(st.sampled_from(tensors).flatmap(lambda t: st.tuples(st.just(t), changed_state(t))), test, count)


# --- folders --------------------------------------------------------------------------------------------------------------


def tiny(**changes):
    torch.manual_seed(0)
    settings_ = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return tiny_llama(**{**settings_, "vocab_size": 16, "attention_bias": False, **changes})


@pytest.fixture
def quiet():
    """What transformers says of damaged folders."""
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


@examples(10, 600)
def test_from_pretrained(count, tmp_path, quiet):
    from torchao.quantization import quantize_

    model = tiny()
    quantize_(model, IntScaleConfig(group_size=32, scale_search="absmax"))
    save_pretrained(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    wanted = {name: value for name, value in model.state_dict().items()}

    def test(changed):
        replace(path, changed)
        try:
            found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
        except (*OWN, SafetensorError):  # the latter where transformers itself reads what is no safetensors file
            return
        except (OSError, ValueError) as error:  # what transformers makes of files without a format that it knows
            assert "safetensors" in str(error) or "metadata" in str(error), error
            return
        judge(found, wanted, path, has_checksums(changed))

    explore(damaged(content), test, count)


def gptq(model, folder):
    def parts(name, weight):
        layer = quantize_groups(weight, 32, False)
        return layer, gptq_parts(layer)

    config = {
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "sym": False,
        "dynamic": {"-:x": {}},
    }
    return write_checkpoint(model, folder, "gptq", parts, config)


def awq(model, folder):
    def parts(name, weight):
        layer = quantize_groups(weight, 32, False)
        return layer, awq_parts(layer)

    return write_checkpoint(
        model, folder, "awq", parts, {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    )


def compressed(model, folder):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors makes these checkpoints")
    scheme = compressed_scheme(group_size=32)

    def parts(name, weight):
        layer = quantize_groups(weight, 32, True, torch.float32)
        return layer, compressed_parts(layer, weight, scheme)

    config = {"config_groups": {"group_0": scheme}, "format": "pack-quantized", "ignore": ["lm_head"]}
    return write_checkpoint(model, folder, "compressed-tensors", parts, config)


@examples(15, 700)
@pytest.mark.parametrize("make", [gptq, awq, compressed], ids=lambda make: make.__name__)
def test_checkpoints_of_other_tools(make, count, tmp_path, quiet):
    """Without checksums: what loads has weights that hold what they say, for the names that are stored quantized."""
    checkpoint = make(tiny(), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    stored, described = weights.read_bytes(), json.loads(config.read_text())

    def test(example):
        replace(weights, example[0])
        replace(config, example[1])
        try:
            model, _ = load_foreign(tmp_path)
        except OWN:
            return
        for name in checkpoint.originals:
            model.get_submodule(name).weight.validate(name)

    explore(changed_folder(stored, described), test, count)
