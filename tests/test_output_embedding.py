"""``IntScaleConfig.output_embedding``: the output embedding in W8A8 by one switch, through every door."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

import intscale_compile
from intscale_compile import CalibrationConfig, IntScaleConfig, IntScaleTensor, calibrate
from intscale_compile.commands.inspection import plan
from intscale_compile.errors import ConfigError, WeightError
from tests.support.compiled import rewritten
from tests.support.quantized import Model, quantized_names

hf = pytest.importorskip("transformers")
W8A8 = IntScaleConfig(scale_search="absmax", output_embedding="w8a8")
BLOCKS = sorted(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down"))
IDS = torch.arange(12)[None]


def llama(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=48,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval().requires_grad_(False)


def in_eight_bits(weight: torch.Tensor) -> IntScaleTensor:
    return IntScaleTensor.from_hp(weight.detach(), IntScaleConfig(weight_bits=8, group_size=-1))


def assert_is(head: torch.Tensor, weight: torch.Tensor) -> None:
    """``head`` is ``weight`` per channel in 8 bits, to the bit."""
    expected = in_eight_bits(weight)
    assert isinstance(head, IntScaleTensor) and (head.weight_bits, head.group_size) == (8, -1)
    assert torch.equal(head.qdata, expected.qdata) and torch.equal(head.row_scale, expected.row_scale)


@pytest.mark.parametrize("how", ["torchao", "ours", "table", "second call"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_switch_quantizes_the_output_embedding_and_nothing_more(how, tied):
    model = Model(tied=tied)
    original = model.lm_head.weight
    if how == "torchao":
        quantize_(model, W8A8)
    elif how == "ours":
        intscale_compile.quantize(model, W8A8)
    elif how == "table":
        quantize_(model, FqnToConfig({"_default": W8A8}), filter_fn=None)
    else:
        quantize_(model, IntScaleConfig(scale_search="absmax"))
        assert quantized_names(model) == BLOCKS
        quantize_(model, W8A8)
    assert quantized_names(model) == [*BLOCKS, "lm_head.weight"]
    assert model.blocks[0]["up"].weight.weight_bits == 4
    assert_is(model.lm_head.weight, original)
    assert type(model.embed.weight) is nn.Parameter
    assert (model.embed.weight is original) == tied


def test_a_filter_that_leaves_it_out_wins_and_that_is_said(caplog):
    model = Model()
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        quantize_(model, W8A8, filter_fn=lambda module, name: name.endswith("up"))
    assert quantized_names(model) == ["blocks.0.up.weight", "blocks.1.up.weight"]
    assert "no output embedding is quantized: the filter does not select lm_head." in caplog.text


def test_an_unknown_value_is_refused():
    with pytest.raises(ConfigError, match=r"output_embedding='int8' is not supported: use \"w8a8\" or None"):
        IntScaleConfig(output_embedding="int8")


def test_a_tied_model_is_untied_and_says_what_that_costs(caplog):
    model = llama(tied=True)
    original = model.lm_head.weight
    with caplog.at_level(logging.INFO, "intscale_compile"):
        quantize_(model, W8A8)
    assert "lm_head.weight is shared with the input embedding" in caplog.text and "0.0 MB in 8 bits" in caplog.text
    assert model.config.tie_word_embeddings is False and model.model.embed_tokens.weight is original
    report = intscale_compile.explain(model, IDS)
    assert "lm_head: the output embedding has a weight of its own" in str(report)
    row = next(one for one in report.layers if one.name == "lm_head.weight")
    assert row.decision == "W8A8"


def test_a_failure_ties_it_again():
    model = llama(tied=True)
    original = model.lm_head.weight
    model.model.layers[0].mlp.down_proj.weight.data[0] = float("inf")
    with pytest.raises(WeightError):
        quantize_(model, W8A8)
    assert model.lm_head.weight is original and model.config.tie_word_embeddings is True


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_loads_to_the_bit(tied, tmp_path):
    model = llama(tied)
    quantize_(model, W8A8)
    intscale_compile.save_pretrained(model, tmp_path / "m")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert loaded.lm_head.weight.weight_bits == 8 and type(loaded.model.embed_tokens.weight) is nn.Parameter
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    intscale_compile.save_safetensors(model, tmp_path / "m.safetensors")
    fresh = llama(tied=False)
    fresh.load_state_dict(intscale_compile.load_safetensors(tmp_path / "m.safetensors"), assign=True)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_from_pretrained_quantizes_it_as_it_is_read(tmp_path):
    model = llama(tied=False)
    model.save_pretrained(tmp_path / "plain")
    quantize_(model, W8A8)
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, quantization_config=hf.TorchAoConfig(W8A8)
    )
    assert quantized_names(loaded) == quantized_names(model) and loaded.lm_head.weight.weight_bits == 8
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    intscale_compile.save_pretrained(loaded, tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_from_pretrained_refuses_what_it_cannot_untie(tmp_path):
    llama(tied=True).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="lm_head shares the weight of the input embedding"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=hf.TorchAoConfig(W8A8))


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_compiler_does_the_same_with_a_plain_model(tied):
    plain = llama(tied)
    model = copy.deepcopy(plain)
    quantize_(model, W8A8)
    options = {"intscale.output_embedding": "w8a8", "intscale.scale_search": "absmax"}
    report = intscale_compile.explain(plain, IDS, options=options)
    rows = {one.name: one for one in report.layers}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert rows[head].decision == "W8A8" and "because intscale.output_embedding asks for it" in str(report)
    assert rows["model.layers.0.mlp.up_proj.weight"].decision == "W4A8"
    with torch.no_grad():
        assert torch.allclose(rewritten(plain, **options)(IDS).logits, model(IDS).logits, atol=1e-4)
    assert (
        type(plain.lm_head.weight) is nn.Parameter and (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    )


@pytest.mark.slow
def test_the_option_reaches_a_model_that_was_quantized_without_it():
    model = llama(tied=False)
    quantize_(model, IntScaleConfig(scale_search="absmax"))
    report = intscale_compile.explain(model, IDS, options={"intscale.output_embedding": "w8a8"})
    assert {one.decision for one in report.products} == {"W4A8", "W8A8"}
    report = intscale_compile.explain(model, IDS)
    assert [one.reason for one in report.fallbacks] == ["OUTPUT_EMBEDDING"]


def test_calibrate_takes_it_from_the_base_config():
    model = llama(tied=True)
    original = model.lm_head.weight.clone()
    chosen = CalibrationConfig.from_preset("rtn", output_embedding="w8a8")
    report = calibrate(model, torch.randint(0, 48, (2, 16)), chosen, progress=False)
    assert report.weights[-1] == "lm_head.weight" and len(report.weights) == 8
    assert_is(model.lm_head.weight, original)
    assert any("no longer tied" in change for change in report.changes)
    assert CalibrationConfig.from_dict(chosen.to_dict()) == chosen
    older = chosen.to_dict()
    del older["base_config"]["output_embedding"]
    assert CalibrationConfig.from_dict(older).base_config.output_embedding is None


def test_the_plan_of_the_command_line_counts_it():
    rows = {one.name: one for one in plan(llama(tied=False), W8A8)}
    assert (rows["lm_head.weight"].decision, rows["lm_head.weight"].bytes_after) == (
        "W8A8",
        48 * (128 + 1 + 4),
    )  # padded
    assert rows["model.layers.0.mlp.up_proj.weight"].decision == "W4A8"
