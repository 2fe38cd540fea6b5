"""``prepare_for_generation``: the tokens of the eager quantized model in every way of decoding, one compilation a form."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, prepare_for_generation
from intscale_compile.backend import bind, rewrite_graph
from intscale_compile.compile.options import parse_options
from intscale_compile.errors import ConfigError
from intscale_compile.integrations.transformers_layers import folding_output

transformers = pytest.importorskip("transformers")
from tests.support.model_families import FAMILIES, token_ids  # noqa: E402

TOKENS = 6
WAYS = {
    "greedy": {},
    "sampling": dict(do_sample=True, top_k=20),
    "beams": dict(num_beams=3, do_sample=False),
    "several": dict(num_return_sequences=2, do_sample=True),
}


def without_inductor(graphs):
    def backend(gm, example_inputs, options=None, mode=None):
        settings, _ = parse_options(None, options)
        graphs.append(rewrite_graph(gm, example_inputs, settings))
        return bind(graphs[-1], lambda graph, _: graph.forward)

    backend.takes_intscale_options = True
    return backend


def build(name="llama", quantized=True):
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.get_input_embeddings().weight.data.mul_(10)
    model.set_output_embeddings(nn.Linear(*reversed(model.get_output_embeddings().weight.shape), bias=False))
    if quantized:
        quantize_(model, IntScaleConfig())
    return model


def generate(model, ids=None, **arguments):
    torch.manual_seed(0)
    ids = token_ids() if ids is None else ids
    arguments = {"max_new_tokens": TOKENS, "do_sample": False, **arguments}
    return model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **arguments)


@pytest.fixture(scope="module")
def models():
    """The eager model, the prepared one, and the graphs that were compiled for the second."""
    torch._dynamo.reset()
    eager, graphs = build(), []
    model = copy.deepcopy(eager)
    prepare_for_generation(model, backend=without_inductor(graphs), prompt="compiled", max_cache_len=32)
    return eager, model, graphs


@pytest.mark.same_graphs
@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way == "several" else ()) for way in WAYS])
def test_every_way_of_decoding(models, way):
    eager, model, _ = models
    expected = generate(eager, cache_implementation="static", disable_compile=True, **WAYS[way])
    assert torch.equal(generate(model, **WAYS[way]), expected)
    assert len(set(expected[0, -TOKENS:].tolist())) > 1, "these tokens prove nothing"


@pytest.mark.same_graphs
def test_prompts_of_other_lengths_compile_nothing(models):
    eager, model, graphs = models
    generate(model)
    before, prompts = len(graphs), model._intscale_generation.prompts
    with torch._dynamo.config.patch(error_on_recompile=True):
        for columns in (5, 9, 17):
            ids = token_ids(2, columns)
            assert torch.equal(
                generate(model, ids), generate(eager, ids, cache_implementation="static", disable_compile=True)
            )
    assert len(graphs) == before and model._intscale_generation.prompts == prompts + 3


@pytest.mark.same_graphs
def test_padding(models):
    eager, model, _ = models
    ids = token_ids()
    ids[0, :4] = 0
    expected = generate(eager, ids, cache_implementation="static", disable_compile=True)
    prompts = model._intscale_generation.prompts
    assert torch.equal(generate(model, ids), expected)
    assert model._intscale_generation.prompts == prompts, (
        "a padded prompt is not the whole prompt that the graph is for"
    )


@pytest.mark.same_graphs
def test_prompts_attend_without_a_mask_and_to_themselves_only(models):
    _, model, graphs = models
    generate(model)
    calls = [n for g in graphs for n in g.graph.nodes if n.target is torch.nn.functional.scaled_dot_product_attention]
    causal = [n for n in calls if n.kwargs.get("is_causal")]
    assert causal and all(n.kwargs.get("attn_mask") is None and n.args[1].target is torch.narrow for n in causal)


@pytest.mark.same_graphs
def test_a_second_prompt_in_one_cache(models):
    """What is in the cache already is seen: that prompt is not compiled."""
    eager, model, _ = models
    answers = []
    for m, arguments in (
        (eager, dict(cache_implementation="static", disable_compile=True, max_cache_len=32)),
        (model, {}),
    ):
        first = generate(m, return_dict_in_generate=True, **arguments)
        name = "cache" if getattr(first, "cache", None) is not None else "past_key_values"
        more = torch.cat([first.sequences, token_ids(2, 4)], dim=1)
        answers.append(
            generate(m, more, **{name: getattr(first, name)}, cache_implementation=None, disable_compile=True)
        )
    assert torch.equal(*answers)


@pytest.mark.same_graphs
def test_assisted_decoding_runs_eagerly(models, caplog):
    eager, model, graphs = models
    before = len(graphs)
    for how in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=copy.deepcopy(eager))):
        expected = generate(eager, token_ids(1), **how)
        assert torch.equal(generate(model, token_ids(1), **how), expected)
    assert len(graphs) == before
    assert not [r for r in caplog.records if "unable to meet the criteria" in r.getMessage()]


@pytest.mark.same_graphs
def test_the_cache_is_kept_unless_somebody_holds_it(models):
    _, model, _ = models
    state = model._intscale_generation
    for _ in range(3):  # Dynamo holds what it compiled with
        generate(model)
    kept = state._cache.layers[0].keys.data_ptr()
    generate(model)
    assert state._cache.layers[0].keys.data_ptr() == kept
    held = generate(model, return_dict_in_generate=True)
    cache = getattr(held, "cache", None) or held.past_key_values
    before = cache.layers[0].keys.clone()
    generate(model, token_ids().flip(1))
    assert torch.equal(cache.layers[0].keys, before) and state._cache is not cache


@pytest.mark.same_graphs
def test_copies_and_undoing(models):
    eager, model, _ = models
    other = copy.deepcopy(model)
    assert other.forward.__self__ is other and other._intscale_generation is not model._intscale_generation
    assert "input_ids" in __import__("inspect").signature(other.forward).parameters
    intscale_compile.generation.undo_prepare_for_generation(other)
    assert "forward" not in other.__dict__ and other.generation_config.compile_config is None
    assert torch.equal(generate(other), generate(eager))


@pytest.mark.same_graphs
def test_outside_of_generate_nothing_changes(models):
    eager, model, graphs = models
    before = len(graphs)
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, eager(token_ids()).logits)
    assert len(graphs) == before


def test_layers_share_one_graph(models, caplog):
    """``prompt="layers"``: whatever the length, and the tokens are those of the other ways."""
    eager, graphs = models[0], []
    model = copy.deepcopy(eager)
    setup = prepare_for_generation(model, backend=without_inductor(graphs), prompt="layers", max_cache_len=32)
    assert "one graph for all layers and lengths" in setup.prompt
    generate(model)
    assert len(graphs) == 2  # a layer, and the decoding step
    with torch._dynamo.config.patch(error_on_recompile=True):
        for columns in (5, 9, 17):
            ids = token_ids(2, columns)
            assert torch.equal(
                generate(model, ids), generate(eager, ids, cache_implementation="static", disable_compile=True)
            )
    assert len(graphs) == 2 and model._intscale_generation.prompts == 4
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    again = copy.deepcopy(model)
    assert again._intscale_generation.by_layer and torch.equal(generate(again), generate(eager))


def test_layers_that_cannot_be_told_are_compiled_as_a_whole(monkeypatch, caplog):
    model, graphs = build(), []
    model.model.layers[0].self_attn.layer_idx = 5
    setup = prepare_for_generation(model, backend=without_inductor(graphs), prompt="layers")
    assert setup.prompt == "torch.compile, one graph for all lengths" and not model._intscale_generation.by_layer
    plain = build(quantized=False)
    assert "layers" not in prepare_for_generation(plain, prompt="layers").prompt  # quantized while they are compiled
    model.model.layers[0].self_attn.layer_idx = 0
    prepare_for_generation(model, backend=without_inductor(graphs), prompt="layers")
    monkeypatch.setattr("intscale_compile.integrations.transformers_layers.CACHE_NAMES", ("another name",))
    generate(model)
    assert not model._intscale_generation.by_layer and "compiled as a whole from the next one on" in caplog.text
    assert "forward" not in model.model.layers[0].__dict__


@pytest.mark.parametrize(
    "name, said",
    [("qwen3", None), ("falcon", "the form of its cache is not known"), ("mistral", "see a part of the prompt")],
)
def test_prompts_of_families(name, said, caplog):
    """Masks by kind of layer (Qwen), one head of keys (Falcon), windows (Mistral): right, and what runs eagerly is said once."""
    eager, graphs = FAMILIES[name].build(), []
    eager.config.use_cache = eager.generation_config.use_cache = True
    eager.generation_config.eos_token_id, eager.generation_config.pad_token_id = None, 0
    quantize_(eager, IntScaleConfig())
    model = copy.deepcopy(eager)
    prepare_for_generation(model, backend=without_inductor(graphs), prompt="layers", max_cache_len=32)
    for columns in (5, 9):
        ids = token_ids(2, columns)
        arguments = dict(cache_implementation="static", disable_compile=True, max_cache_len=32)
        answers = [generate(m, ids, max_new_tokens=10, **a) for m, a in ((model, {}), (eager, arguments))]
        assert torch.equal(*answers)
    assert model._intscale_generation.prompts == {"qwen3": 2, "falcon": 1, "mistral": 0}[name]
    assert len(graphs) <= 4  # with a constant count of tokens each step of a window was compiled, and after eight none
    messages = [r.getMessage() for r in caplog.records if "that prompt runs eagerly" in r.getMessage()]
    assert len(messages) == (said is not None) and all(said in message for message in messages)


def test_what_fails_with_a_static_cache_stays_eager(caplog):
    """XLM repeats its mask for as many keys as there are tokens; transformers' own call with a static cache fails too."""
    model = transformers.XLMWithLMHeadModel(
        transformers.XLMConfig(vocab_size=160, emb_dim=64, n_layers=1, n_heads=2, max_position_embeddings=64)
    ).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    quantize_(model, IntScaleConfig())
    expected = generate(model)
    setup = prepare_for_generation(model, backend=without_inductor([]))
    assert "XLMWithLMHeadModel fails in transformers with a static cache" in setup.decoding and setup.prompt == "eager"
    assert setup.decoding in caplog.text and model.generation_config.cache_implementation is None
    assert torch.equal(generate(model), expected)


def test_a_cache_with_states_beside_keys(caplog):
    """Linear attention (Qwen3-Next): its part of the cache has neither a length nor a count of tokens."""
    config = transformers.Qwen3NextConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=32,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=32,
        linear_value_head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    eager = transformers.Qwen3NextForCausalLM(config).eval().requires_grad_(False)
    eager.generation_config.eos_token_id, eager.generation_config.pad_token_id = None, 0
    quantize_(eager, IntScaleConfig())
    model = copy.deepcopy(eager)
    prepare_for_generation(model, backend=without_inductor([]), prompt="compiled", max_cache_len=32)
    for columns in (9, 5):
        ids = token_ids(1, columns)
        arguments = dict(cache_implementation="static", disable_compile=True, max_cache_len=32)
        assert torch.equal(generate(model, ids), generate(eager, ids, **arguments))
    assert "keep something else than keys and values (LinearAttentionLayer" in caplog.text


def test_what_it_says(caplog):
    model = build()
    with caplog.at_level(logging.INFO, "intscale_compile"):
        setup = prepare_for_generation(model, max_cache_len=64)
    text = str(setup)
    assert text in caplog.text and "one graph for all layers and lengths" in text and "at least 64 tokens" in text
    assert setup.quantized == setup.linears - 1 and model.generation_config.compile_config.mode == "default"
    encoder = FAMILIES["t5"].build()
    assert prepare_for_generation(encoder, prompt="compiled").prompt == "eager"
    with pytest.raises(ConfigError, match="prompt='fast'"):
        prepare_for_generation(model, prompt="fast")
    with pytest.raises(ConfigError, match="no generate"):
        prepare_for_generation(nn.Linear(2, 2))


def test_the_output_embedding_sees_tokens_with_memory_of_their_own():
    """Beside compiled layers it runs eagerly, on a slice of all tokens, for which PyTorch would copy its weight on a CPU."""
    model, strides = build(), []
    hidden = torch.randn(1, 9, model.config.hidden_size)
    with folding_output(model):
        handle = model.lm_head.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
        found = model.lm_head(hidden[:, -1:, :])
        model.lm_head(hidden)
        handle.remove()
    width = model.config.hidden_size
    assert strides == [(width, width, 1), (9 * width, width, 1)] and not model.lm_head._forward_pre_hooks
    assert torch.allclose(found, model.lm_head(hidden)[:, -1:], atol=1e-5)
