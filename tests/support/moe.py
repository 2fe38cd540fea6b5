"""Small experts modules of transformers in every layout, and a routing for them."""

from __future__ import annotations

import torch
from torch import nn

HIDDEN, INNER, EXPERTS = 128, 192, 4


def experts_module(kind: str, implementation: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module with random weights.

    Kinds: ``mixtral`` ``[E, N, K]``, ``gpt_oss`` ``[E, K, N]`` with biases, ``nemotron_h`` without a gate.
    """
    if kind == "mixtral":
        from transformers import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Experts

        config = Config(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    elif kind == "gpt_oss":
        from transformers import GptOssConfig as Config
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config = Config(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    else:
        from transformers import NemotronHConfig as Config
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts

        config = Config(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS)
    config._experts_implementation = implementation
    module = Experts(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return module.to(dtype).requires_grad_(False).eval()


def routing(tokens: int, chosen: int = 2, dtype: torch.dtype = torch.float32):
    """Hidden states ``[tokens, HIDDEN]``, chosen experts and their weights ``[tokens, chosen]``; expert 2 gets nothing."""
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:chosen] for _ in range(tokens)])
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weights = torch.rand(tokens, chosen, generator=generator)
    return x.to(dtype), torch.where(index == 2, 3, index), weights.to(dtype)


def sqnr(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Signal to quantization noise in dB; infinite where they are equal."""
    reference, value = reference.float(), value.float()
    return (10 * torch.log10(reference.square().mean() / (reference - value).square().mean())).item()
