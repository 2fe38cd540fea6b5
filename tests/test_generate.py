"""``model.generate`` with a compiled forward: the tokens of the eager quantized model, and no recompilation per token."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, linears_and_experts
from intscale_compile.compile.binding import bind, rewrite_graph
from intscale_compile.compile.options import parse_options

pytest.importorskip("transformers")
from tests.support.model_families import FAMILIES, token_ids  # noqa: E402

TOKENS = 8


def without_inductor(graphs):
    """The backend's rewrite with the graph run as it is; appends each graph to ``graphs``."""
    settings, _ = parse_options(None, None)

    def backend(gm, example_inputs):
        graphs.append(gm)
        return bind(rewrite_graph(gm, example_inputs, settings), lambda graph, _: graph.forward)

    return backend


STATIC = [pytest.param(name, "static", marks=pytest.mark.slow) for name in ("gpt2", "llama", "qwen2")]


@pytest.mark.parametrize(("name", "cache"), [("gpt2", "dynamic"), ("t5", "static"), *STATIC])
def test_generate(name, cache):
    torch._dynamo.reset()
    model = FAMILIES[name].build(layers=1)
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.eos_token_id = None
    # A random model repeats one token: with a head tied to the embedding its last, with small embeddings always the same.
    model.get_input_embeddings().weight.data.mul_(10)
    model.set_output_embeddings(nn.Linear(*reversed(model.get_output_embeddings().weight.shape), bias=False))
    quantize_(model, IntScaleConfig(), filter_fn=linears_and_experts)
    eager = copy.deepcopy(model)
    arguments = {
        "input_ids": token_ids(),
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,  # of transformers' own: the forward is compiled here
    }
    graphs = []
    model.forward = torch.compile(model.forward, backend=without_inductor(graphs))
    expected = eager.generate(**arguments)
    assert torch.equal(model.generate(**arguments), expected)
    assert len(set(expected[0, -TOKENS:].tolist())) > 2, "these tokens prove nothing"
    # Prefill and decode; a cache that grows is compiled once more, with symbolic sizes.
    assert len(graphs) == (2 if cache == "static" else 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model.generate(**arguments), expected)
