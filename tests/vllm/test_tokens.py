"""All 128 greedy tokens, and all activations, are those of transformers where the operations around our layers are the same.

vLLM's attention, rotary embedding and choice of experts round otherwise than transformers'; here both have torch's, and the
products of routers are rounded once.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from engines import engine, equal_tokens, generate, load_model, prompts, record, reference, weights_of  # noqa: E402
from made import every_format, imported, rotated, untied  # noqa: E402
from torch_operations import exact_router_products, torch_attention, torch_routing  # noqa: E402

from intscale_compile.commands.quantizing import quantize_folder  # noqa: E402

# An option of vLLM: the operation written in torch's.
NATIVE_ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}


@contextlib.contextmanager
def same_arithmetic(folder, **changes):
    """An engine that rounds in attention, rotary embedding and the choice of experts as transformers does."""
    with torch_attention(), torch_routing(), engine(folder, **NATIVE_ROTARY, **changes) as llm:
        yield llm


def ours(source, folder):
    """What ``intscale quantize`` writes."""
    quantize_folder(source, folder, dtype=torch.float32, progress=False)


CASES = {
    "tied head": ("llama", ours, {}),
    "untied head": ("llama", untied, {}),
    "every format": ("llama", every_format, {}),
    "rotated": ("llama", rotated, {}),
    "mixture of experts": ("mixtral", ours, {}),
    **{
        kind: ("llama", lambda source, folder, kind=kind: imported(source, folder, kind), {"quantization": "intscale"})
        for kind in ("gptq", "gptq with activation order", "awq", "compressed-tensors")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_128_of_128_tokens_are_those_of_transformers(case, folders, request):
    source, make, how = CASES[case]
    folder = folders / f"tokens-{case.replace(' ', '-')}"
    make(request.getfixturevalue(source), folder)
    ids, (model, _) = prompts(folder), load_model(folder, dtype=torch.float32)
    assert model.config.tie_word_embeddings == (case not in ("untied head", "rotated"))
    with same_arithmetic(folder, **how) as llm:
        exact_router_products(llm, model)
        tokens = generate(llm, ids)
        calls = record(llm)
        generate(llm, ids, 1)
    for name, seen in activations(model, ids).items():
        assert torch.equal(seen, calls[name][0][0]), name
    assert equal_tokens(tokens, reference(model, ids)) == [128] * 4


def activations(model, ids):
    """The activation of each linear layer, named as vLLM's merged ones, in transformers: prompt by prompt, rows joined."""
    seen: dict[str, list] = {}
    handles = []
    for name, module in model.named_modules():
        merged = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
        leaf = name.rpartition(".")[2]
        if leaf in ("q_proj", "o_proj", "gate_proj", "down_proj") and "expert" not in name:
            known = f"{name.removesuffix(leaf)}{merged.get(leaf, leaf)}"
            handles.append(
                module.register_forward_hook(lambda m, a, o, k=known: seen.setdefault(k, []).append(a[0][0].clone()))
            )
    with torch.no_grad():
        for prompt in ids:
            model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    assert all(weights_of(model, name) for name in seen) and len(seen) >= 8
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_what_rounds_otherwise_is_attention_and_may_be_rotary_embedding(llama, folders, capsys):
    """The first layer's activation is that of transformers whatever they are; attention's result where both are torch's.

    vLLM's rotary embedding rounds otherwise with AVX-512, and as torch's without.
    """
    folder = folders / "tokens-operations"
    ours(llama, folder)
    ids, (model, _) = prompts(folder), load_model(folder, dtype=torch.float32)
    wanted = activations(model, ids)
    first, result = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"

    def differences(attention, **changes):
        with attention, engine(folder, **changes) as llm:
            calls = record(llm)
            generate(llm, ids, 1)
        assert torch.equal(calls[first][0][0], wanted[first])
        return float((calls[result][0][0] - wanted[result]).abs().max())

    neither = differences(torch_attention(), **NATIVE_ROTARY)
    rotary, attention = differences(torch_attention()), differences(contextlib.nullcontext(), **NATIVE_ROTARY)
    size = float(wanted[result].abs().max())
    assert neither == 0 and rotary < 1e-5 * size and 0 < attention < 1e-5 * size
    with capsys.disabled():
        print(f"\nlargest difference after attention, of values up to {size:.3g}: rotary {rotary:.2g}, {attention:.2g}")
