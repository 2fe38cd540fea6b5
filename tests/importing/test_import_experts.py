"""Checkpoints with one tensor per expert become transformers' stacks of experts."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors import safe_open

from intscale_compile import IntScaleTensor, from_quantized, save_compressed_tensors
from intscale_compile.errors import CheckpointError, ConfigError
from tests.support.quantized_checkpoints import awq_parts, gptq_parts, quantize_groups, save_folder, snr_db


def tiny_moe(kind: str):
    import transformers

    shared = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shared |= {"vocab_size": 64, "dtype": torch.float32, "num_experts_per_tok": 2}
    if kind == "mixtral":
        config = transformers.MixtralConfig(**shared, intermediate_size=192, num_local_experts=4)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(**shared, head_dim=32, moe_intermediate_size=192, num_experts=4)
        model = transformers.Qwen3MoeForCausalLM(config)
    return model.float().eval().requires_grad_(False)


def written(model, folder, method, symmetric):
    """The model's own checkpoint, where every expert has matrices of its own, with its projections quantized."""
    model.save_pretrained(folder / "plain")
    with safe_open(folder / "plain" / "model.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
    originals = {}
    for key in list(state):
        if re.search(r"(experts\.\d+\.\w+|self_attn\.\w_proj)\.weight$", key):
            name = key.removesuffix(".weight")
            originals[name] = layer = quantize_groups(state.pop(key), 64, symmetric)
            parts = awq_parts(layer) if method == "awq" else gptq_parts(layer)
            state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    model.config.architectures = [type(model).__name__]
    config = {"quant_method": method, "bits": 4, "group_size": 64}
    save_folder(model.config, folder, state, config)
    return originals, state, config


@pytest.mark.parametrize("kind, method, symmetric", [("mixtral", "gptq", True), ("qwen3_moe", "awq", False)])
def test_experts_are_stacked(kind, method, symmetric, tmp_path):
    model = tiny_moe(kind)
    originals, _, _ = written(model, tmp_path, method, symmetric)
    imported, report = from_quantized(tmp_path)
    assert len(report.layers) == len(originals) == 2 * (4 + 4 * 3)

    up, gate, down = ("w3", "w1", "w2") if kind == "mixtral" else ("up_proj", "gate_proj", "down_proj")
    for i, layer in enumerate(imported.model.layers):
        experts = layer.mlp.experts
        assert isinstance(experts.gate_up_proj, IntScaleTensor) and isinstance(experts.down_proj, IntScaleTensor)
        assert not experts.gate_up_proj.requires_grad
        assert not isinstance(layer.mlp.gate.weight, IntScaleTensor)  # the router
        for e in range(4):
            prefix = next(name for name in originals if f"layers.{i}." in name and f"experts.{e}." in name)
            prefix = prefix.rpartition(".")[0]
            both = torch.cat([originals[f"{prefix}.{gate}"].codes, originals[f"{prefix}.{up}"].codes])
            assert torch.equal(experts.gate_up_proj[e].codes.long() + 8, both)
            assert torch.equal(experts.down_proj[e].codes.long() + 8, originals[f"{prefix}.{down}"].codes)
            assert snr_db(originals[f"{prefix}.{down}"].weight, experts.down_proj[e].dequantize(torch.float64)) > 50
            weight = torch.cat([originals[f"{prefix}.{part}"].weight for part in (gate, up)])
            assert snr_db(weight, experts.gate_up_proj[e].dequantize(torch.float64)) > 50

    ids = torch.randint(0, 64, (2, 16))
    dense = _with_dequantized_weights(tiny_moe(kind), imported)
    assert snr_db(dense(ids).logits, imported(ids).logits) > 20  # activations in 8 bits are all that differs


def _with_dequantized_weights(plain, imported):
    state = {
        name: value.dequantize() if isinstance(value, IntScaleTensor) else value
        for name, value in imported.state_dict().items()
    }
    plain.load_state_dict(state)
    return plain


def test_an_expert_that_is_missing(tmp_path):
    model = tiny_moe("mixtral")
    _, state, config = written(model, tmp_path, "gptq", True)
    name = next(key for key in state if "experts.2." in key and key.endswith("qweight")).removesuffix(".qweight")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del state[f"{name}.{part}"]
    save_folder(model.config, tmp_path, state, config)
    with pytest.raises(CheckpointError):
        from_quantized(tmp_path)


def test_stacks_are_not_exported(tmp_path):
    written(tiny_moe("mixtral"), tmp_path / "in", "gptq", True)
    imported, _ = from_quantized(tmp_path / "in")
    with pytest.raises(
        ConfigError, match="experts.gate_up_proj: compressed-tensors stores weights of linear layers only"
    ):
        save_compressed_tensors(imported, tmp_path / "out")


def test_one_expert_that_is_not_quantized(tmp_path):
    """Experts become one stack: the error names the one that differs, and what to do."""
    model = tiny_moe("mixtral")
    originals, state, config = written(model, tmp_path, "gptq", True)
    name = "model.layers.1.block_sparse_moe.experts.2.w1"
    assert name in originals
    state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
    state[f"{name}.weight"] = originals[name].weight.float()
    save_folder(model.config, tmp_path, state, config)
    with pytest.raises(ConfigError, match=rf"{name} is not quantized, but .* one stack: quantize all experts"):
        from_quantized(tmp_path)
