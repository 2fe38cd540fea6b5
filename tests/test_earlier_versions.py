"""Files that earlier versions saved load to the bit. ``fixtures/saved_by_0_1_0`` is from before the package had its folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from intscale_compile import IntScaleTensor, load_safetensors
from intscale_compile.reasons import log_once
from intscale_compile.saving.checkpoint import rebuild_tensor
from intscale_compile.tensors.fields import ALL_NAMES

SAVED = Path(__file__).with_name("fixtures") / "saved_by_0_1_0"
EXPECTED = torch.load(SAVED / "expected.pt", weights_only=True)  # "file|parameter|inner tensor"


def assert_as_saved(state, file):
    wanted = {tuple(key.split("|")[1:]): part for key, part in EXPECTED.items() if key.startswith(f"{file}|")}
    quantized = {name: tensor for name, tensor in state.items() if isinstance(tensor, IntScaleTensor)}
    assert {(name, part) for name, tensor in quantized.items() for part in tensor.data_names} == set(wanted)
    for (name, part), value in wanted.items():
        assert torch.equal(getattr(quantized[name], part), value), (name, part)


def test_torch_save_with_weights_only():
    assert_as_saved(torch.load(SAVED / "formats.pt", weights_only=True), "formats")


def test_safetensors_of_our_own():
    assert_as_saved(load_safetensors(SAVED / "formats.safetensors"), "formats")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_save_pretrained(name):
    model = AutoModelForCausalLM.from_pretrained(SAVED / name, dtype=torch.bfloat16)
    assert_as_saved(model.state_dict(), name)


def test_wire_format_in_a_stored_weight(caplog, tmp_path):
    """Version 0.1.0 kept one in each weight: accepted and dropped, said once where it was not None."""
    log_once.cache_clear()
    log_once.cache_clear()
    weights = [t for t in load_safetensors(SAVED / "formats.safetensors").values() if isinstance(t, IntScaleTensor)]
    for weight in weights[:2]:
        parts = {name: getattr(weight, name) for name in ALL_NAMES}
        assert torch.equal(rebuild_tensor(**parts, communication="int8"), weight)
        stored = weight.detach()
        stored.__dict__["communication"] = "int4"
        torch.save(stored, tmp_path / "weight.pt")
        loaded = torch.load(tmp_path / "weight.pt", weights_only=True)
        assert torch.equal(loaded, weight) and not hasattr(loaded, "communication")
    assert caplog.text.count("as version 0.1.0 stored it: that is ignored") == 1
    log_once.cache_clear()
