"""Engines of vLLM for the tests, models of transformers to compare with, and what passes through their layers."""

from __future__ import annotations

import contextlib
import gc
import textwrap
from pathlib import Path

import torch
from torch.nn import functional as F

from intscale_compile import IntScaleTensor
from intscale_compile.commands.loading import load_model, load_tokenizer

MODULES = ("textwrap", "fractions", "sched", "shelve")  # of the standard library: text for prompts
SIBLINGS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FP32 = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "disable_log_stats": True, "seed": 0}


class Engine:
    """An ``LLM`` that its users let go of: one that is collected late would shut down the next one's process groups."""

    def __init__(self, llm):
        self.llm = llm

    def __getattr__(self, name):
        return getattr(self.llm, name)


@contextlib.contextmanager
def engine(folder, **changes):
    """An offline engine, and nothing of it afterwards, nor of one that could not be made before.

    vLLM keeps rotary embeddings by their sizes, whatever options they were made with, until an engine shuts down; one that failed
    while it was made never does. The next one would compute with its operation, not with the one that it asks for.
    """
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    _ROPE_DICT.clear()
    found = Engine(LLM(str(folder), **{**FP32, "enable_prefix_caching": False, **changes}))
    try:
        yield found
    finally:
        del found.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(folder, count=4, tokens=96):
    """Token ids of the beginnings of modules of the standard library."""
    tokenizer = load_tokenizer(folder)
    library = Path(textwrap.__file__).parent
    texts = [(library / f"{name}.py").read_text() for name in MODULES[:count]]
    return [[0, *tokenizer(text, add_special_tokens=False).input_ids[:tokens]] for text in texts]


def generate(llm, ids, tokens=128):
    """Greedy tokens of an engine for each prompt, and nothing stops them."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)
    outputs = llm.generate([{"prompt_token_ids": i} for i in ids], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def reference(model, ids, tokens=128):
    """The same tokens of transformers."""
    found = []
    for prompt in ids:
        x = torch.tensor([prompt])
        y = model.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(y[0, len(prompt) :].tolist())
    return found


def equal_tokens(ours, theirs):
    """How many tokens are equal before the first difference, for each prompt."""
    pairs = [list(zip(a, b)) for a, b in zip(ours, theirs)]
    return [next((i for i, (a, b) in enumerate(pair) if a != b), len(pair)) for pair in pairs]


def log_likelihood(llm, ids):
    """Mean log likelihood of the tokens of prompts under an engine."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": i} for i in ids],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    values = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
    ]
    return sum(values) / len(values)


def reference_log_likelihood(model, ids):
    """The same of transformers."""
    total, count = 0.0, 0
    for prompt in ids:
        x = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(x).logits[0, :-1].double().log_softmax(-1)
        total += float(logits.gather(-1, x[0, 1:, None]).sum())
        count += len(prompt) - 1
    return total / count


def record(llm, kinds=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")):
    """Record the activation and the output of every call of these layers; returns what is recorded."""
    calls: dict[str, list] = {}

    def hook(model):
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in kinds:
                module.register_forward_hook(
                    lambda module, args, output, name=name: _keep(calls, name, args[0], output)
                )

    llm.apply_model(hook)
    return calls


def _keep(calls, name, x, output):
    y = output[0] if isinstance(output, tuple) else output
    calls.setdefault(name, []).append((x.detach().clone(), y.detach().clone()))


def weights_of(model, name):
    """The layers of transformers' model that vLLM merges in one: modules with weights."""
    parent, _, leaf = name.rpartition(".")
    return [model.get_submodule(f"{parent}.{part}") for part in SIBLINGS.get(leaf, (leaf,))]


def layer_output(model, name, x):
    """What transformers' layers give for an activation."""
    with torch.no_grad():
        return torch.cat([F.linear(x, layer.weight, layer.bias) for layer in weights_of(model, name)], dim=-1)


def is_quantized(model, name):
    """Whether all of the layers are quantized."""
    return all(isinstance(layer.weight, IntScaleTensor) for layer in weights_of(model, name))


__all__ = [name for name in dir() if not name.startswith("_")] + ["load_model"]
