"""One rank of ``test_generate_on_ranks``: ``generate`` of a divided model, compiled with collectives of each kind."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torchao.quantization import quantize_  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import intscale_compile  # noqa: E402
from intscale_compile import IntScaleConfig, prepare_for_generation, tensor_parallel  # noqa: E402
from tests.support.ranks import main  # noqa: E402


def generate(*kinds: str) -> dict:
    """Tokens of each kind and of the model before it was divided, and what became of the collectives."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.pad_token_id = 0
    quantize_(model, IntScaleConfig(32))
    ids = torch.arange(1, 9).view(1, 8)
    arguments = dict(max_new_tokens=6, do_sample=False)
    results = {"whole": model.generate(ids, **arguments)}
    tensor_parallel.parallelize(model)
    for kind in kinds:
        torch._dynamo.reset()
        prepare_for_generation(model, communication=kind)
        results[kind] = model.generate(ids, **arguments)
        found = intscale_compile.debug.last_compilation()[-1].collectives
        results[f"{kind} decisions"] = [one.decision for one in found or ()]
    return results


if __name__ == "__main__":
    main(generate)
