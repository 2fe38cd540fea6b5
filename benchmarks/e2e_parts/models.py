"""Models of real shape with random weights, built on the GPU, and the attention that all peers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ATTENTION = "grouped_sdpa"
LLAMA_3 = dict(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=65536, rope_theta=500000.0)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA_3
    ),
    "llama-3-70b": dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA_3
    ),
    "mixtral-8x7b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=65536,
    ),
    "qwen3-30b-a3b": dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, vocab_size=151936, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True, max_position_embeddings=65536,
    ),
    "tiny": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=65536,
    ),
    "narrow": dict(  # few operations for each byte that sharded layers sum: a link is the larger part of the time
        hidden_size=1024, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=64, vocab_size=512, max_position_embeddings=65536,
    ),
    "tiny-mixtral": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=65536,
    ),
}  # fmt: skip
NORMAL = 0.02  # standard deviation of the weights


def register_attention() -> None:
    """``grouped_sdpa``: PyTorch's attention without copies of the cache for each query head, and causal without a mask.

    transformers' own ``sdpa`` repeats keys and values and passes a mask as soon as it is compiled, which costs every peer
    more than its linear layers at batch 64. The benchmark is about the rest.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        prefill = query.shape[2] > 1
        y = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=None if prefill else attention_mask, is_causal=prefill, scale=scaling, enable_gqa=True
        )  # fmt: skip
        return y.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


def build(
    name: str, layers: int | None, attention: str, device: str, quantize: Callable[[nn.Module], Any] | None = None
) -> nn.Module:
    """The model in bf16 with normal random weights, in eval mode, nothing requiring grad.

    ``quantize`` is called with each decoder layer as soon as it has weights: the whole model need not fit in bf16.
    """
    import transformers

    register_attention()
    values = dict(CONFIGS[name], tie_word_embeddings=False, attn_implementation=attention, dtype=torch.bfloat16)
    if layers is not None:
        values["num_hidden_layers"] = layers
    family = "Mixtral" if "num_local_experts" in values else "Qwen3Moe" if "num_experts" in values else "Llama"
    config = getattr(transformers, f"{family}Config")(**values)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(default)
    model = model.eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    decoder = model.model
    for module in (decoder.embed_tokens, *decoder.layers, decoder.norm, model.lm_head):
        module.to_empty(device=device)
        for parameter_name, parameter in module.named_parameters():
            if "norm" in parameter_name or module is decoder.norm:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, NORMAL, generator=generator)
        if quantize is not None and module is not model.lm_head and not isinstance(module, nn.Embedding):
            quantize(module)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers were on meta
    return model


def quantized_fraction(model: nn.Module) -> float:
    """Share of the parameters that are not held in their original precision."""
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if type(p.data) is not torch.Tensor) / total
