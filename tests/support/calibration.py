"""Small models for the calibration tests: the families, mixtures of experts, Gemma and OPT with one width."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from intscale_compile import IntScaleTensor, calibrate

from .model_families import FAMILIES, GROUPED, TEXT, token_ids

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {name: value for name, value in TEXT.items() if name != "intermediate_size"}


def _mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(num_hidden_layers=2, tie_word_embeddings=True, **EXPERTS, **GROUPED))


def _gpt_oss() -> nn.Module:
    kinds = ["full_attention"] * 2
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = hf.GptOssConfig(
        num_hidden_layers=2, head_dim=32, layer_types=kinds, rope_parameters=rope, **EXPERTS, **GROUPED
    )
    return hf.GptOssForCausalLM(config)


def _gemma() -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(num_hidden_layers=2, head_dim=32, **GROUPED))


def _opt() -> nn.Module:
    return hf.OPTForCausalLM(hf.OPTConfig(num_hidden_layers=2, ffn_dim=256, word_embed_proj_dim=128, **OPT))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "gemma": _gemma,
    "opt_plain": _opt,
}


def small_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in fp32 with random weights, biases and norms, and what it is called with."""
    if name in FAMILIES:
        return FAMILIES[name].build().requires_grad_(False), FAMILIES[name].inputs()
    model = OTHERS[name]().eval().requires_grad_(False)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name_in_model, parameter in model.named_parameters():
        if parameter.dim() == 1 or name_in_model.endswith("bias"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif id(parameter) not in embeddings:
            parameter.mul_(2)
    return model, {"input_ids": token_ids()}


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The first output: logits, or an encoder's hidden states."""
    with torch.no_grad():
        return model(**inputs)[0]


SHORT = {"clipping": "none", "rounding": "nearest"}


def tiny_llama(layers: int = 2) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # far from a linear function, as trained models are
        parameter.mul_(1 + torch.rand_like(parameter)) if parameter.dim() == 1 else parameter.mul_(4)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    other = dict(b.named_parameters())
    return all(
        torch.equal(getattr(p, part), getattr(other[name], part))
        for name, p in a.named_parameters()
        for part in (p.data_names if isinstance(p, IntScaleTensor) else ["data"])
    )


def calibrated(model: nn.Module, data, chosen, **options) -> nn.Module:
    result = copy.deepcopy(model)
    calibrate(result, data, chosen, progress=False, **options)
    return result
