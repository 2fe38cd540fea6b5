"""GPTQ with activation order and scattered groups: codes unchanged, the same logits, siblings in one GEMM."""

from __future__ import annotations

import copy

import pytest
import torch

from intscale_compile import IntScaleTensor, explain, from_quantized, save_compressed_tensors, save_pretrained
from intscale_compile.errors import ConfigError
from intscale_compile.importing.gptq import GptqFormat
from intscale_compile.importing.layers import ScaleOptions, to_intscale
from tests.importing import test_import_experts as moe
from tests.support.quantized_checkpoints import (
    gptq_parts,
    quantize_groups,
    snr_db,
    tiny_llama,
    with_float_scales,
    write_checkpoint,
)

SIBLINGS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def written(model, folder, version="gptq", symmetric=False, group_size=64, apart=()):
    """A folder with scattered ``g_idx``: siblings in one order, as they have one activation, but those in ``apart``."""
    orders: dict[str, torch.Tensor] = {}

    def parts(name, weight):
        block, _, leaf = name.rpartition(".")
        key = name if leaf in apart else f"{block}.{SIBLINGS.get(leaf, leaf)}"
        order = orders.setdefault(key, torch.randperm(weight.shape[1]))
        layer = quantize_groups(weight, group_size, symmetric, order=order)
        return layer, gptq_parts(layer, version)

    config = {"bits": 4, "group_size": group_size, "desc_act": True, "sym": symmetric, "checkpoint_format": version}
    return write_checkpoint(model, folder, "gptq", parts, config)


@pytest.mark.parametrize("version, symmetric, group_size", [("gptq", False, 64), ("gptq_v2", True, 128)])
def test_imported_model(version, symmetric, group_size, tmp_path):
    plain = tiny_llama(num_hidden_layers=1)
    checkpoint = written(plain, tmp_path, version, symmetric, group_size)
    model, report = from_quantized(tmp_path)
    assert report.unquantized == ["lm_head"] and min(row.snr_db for row in report.layers) > 50
    for name, original in checkpoint.originals.items():
        weight = model.get_submodule(name).weight
        back = weight.input_order[0].long().argsort()
        assert torch.equal(weight.codes[:, back].long() + 8, original.codes), f"{name}: a code changed"
        assert (weight.zero_point is None) == symmetric
        if not symmetric:
            assert torch.equal(weight.group_zero_point[:, : original.zero.shape[1]].long() + 8, original.zero)
        assert snr_db(original.weight, weight.dequantize(torch.float64)) > 50

    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for siblings in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert len({id(module.weight.input_order) for module in siblings}) == 1, "siblings share one tensor"

    ids = torch.randint(0, 96, (2, 24))
    reference, found = plain(ids).logits, model(ids).logits
    floats = with_float_scales(copy.deepcopy(plain), checkpoint.originals)(ids).logits
    assert abs(snr_db(reference, found) - snr_db(reference, floats)) < 0.05
    assert snr_db(floats, found) > 40


def test_compiled_and_saved(tmp_path):
    written(tiny_llama(num_hidden_layers=1), tmp_path / "gptq")
    model, _ = from_quantized(tmp_path / "gptq")
    ids = torch.randint(0, 96, (1, 12))
    expected = model(ids).logits
    save_pretrained(model, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").requires_grad_(False)
    assert torch.equal(again(ids).logits, expected)
    kept = []
    hook = again.register_forward_hook(lambda module, args, result: kept.append(result.logits))
    report = explain(again, ids)
    hook.remove()
    assert snr_db(expected, kept[-1]) > 60  # the rewritten graph
    assert report.gemms == report.activation_quantizations == 4 and not report.notes
    assert {layer.activation for layer in report.layers if layer.quantized} == {"input order, per token"}


def test_siblings_with_orders_of_their_own(tmp_path):
    written(tiny_llama(num_hidden_layers=1), tmp_path, apart=("k_proj", "up_proj"))
    model, _ = from_quantized(tmp_path)
    report = explain(model, torch.randint(0, 96, (1, 12)))
    assert report.gemms == 6  # q with v, k, o, gate, up, down
    (note,) = report.notes
    assert "q_proj.weight and model.layers.0.self_attn.k_proj.weight read one activation in different" in note
    assert note.endswith("; nor are 2 more pairs.")  # v beside k, gate beside up


@pytest.mark.parametrize("group_size, k, ours", [(512, 1024, 256), (128, 320, 128), (-1, 256, -1)])
def test_groups_of_other_sizes(group_size, k, ours):
    """Cut groups, a ragged last one, and one group a row, which no order scatters."""
    layer = quantize_groups(torch.randn(48, k), group_size, False, order=torch.randperm(k) if group_size > 0 else None)
    reader = GptqFormat({"bits": 4, "group_size": group_size, "desc_act": True})
    tensor, _ = to_intscale(reader.read("layer", gptq_parts(layer)), "layer", torch.float32, ScaleOptions())
    assert tensor.group_size == ours and (tensor.input_order is None) == (group_size == -1)
    assert snr_db(layer.weight, tensor.validate().dequantize(torch.float64)) > 50


def test_static_groups_need_no_order():
    layer = quantize_groups(torch.randn(48, 256), 64, False)
    parts = gptq_parts(layer)
    for read in (parts, {name: part for name, part in parts.items() if name != "g_idx"}):
        assert GptqFormat({"bits": 4, "group_size": 64, "desc_act": True}).read("layer", read).input_order is None


def test_export_and_experts_are_refused_by_name(tmp_path, monkeypatch):
    written(tiny_llama(num_hidden_layers=1), tmp_path / "gptq")
    model, _ = from_quantized(tmp_path / "gptq")
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, IntScaleTensor)
    with pytest.raises(ConfigError, match=r"q_proj.weight: its input order .* cannot be expressed"):
        save_compressed_tensors(model, tmp_path / "out")

    monkeypatch.setattr(
        moe, "quantize_groups", lambda w, g, s: quantize_groups(w, g, s, order=torch.randperm(w.shape[1]))
    )
    moe.written(moe.tiny_moe("mixtral"), tmp_path / "moe", "gptq", True)
    with pytest.raises(ConfigError, match=r"experts\.0\.w\d: its groups are scattered.*desc_act=False"):
        from_quantized(tmp_path / "moe")
