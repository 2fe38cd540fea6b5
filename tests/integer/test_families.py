"""Families of models beside Llama in integers: near the float form of the same weights, and those that are refused."""

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, integer_only
from intscale_compile.errors import IntegerOnlyError

pytestmark = pytest.mark.generated

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128}
LONG = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
KNOWN = {
    "Mistral": {**DECODER, "sliding_window": 8},
    "Qwen2": DECODER,
    "Qwen3": DECODER,
    "Llama": {**DECODER, "rope_parameters": LONG},
}


def make(name, config, **kwargs):
    torch.manual_seed(0)
    kind = "Model" if name == "Bert" else "ForCausalLM"
    model = getattr(transformers, name + kind)(getattr(transformers, name + "Config")(**config), **kwargs)
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases are zero and norms one in a new model
            parameter.add_(0.2 * torch.randn_like(parameter))
    quantize_(model, IntScaleConfig(group_size=64))
    return model


def both(model, alone=False, **kwargs):
    """Outputs of the float form and of the integer-only one, where the mask lets them be seen.

    ``alone``: the first text has the same bits without the second, which takes another compilation.
    """
    ids = torch.arange(40).view(2, 20) * 7 % 300
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    run = integer_only.run_eagerly(model)
    with torch.no_grad():
        found, expected = (m(ids, attention_mask=mask, **kwargs)[0] for m in (run, model))
        assert not alone or torch.equal(found[:1], run(ids[:1], **kwargs)[0])
    return expected[mask.bool()], found[mask.bool()]


@pytest.mark.parametrize(
    "name", ["Mistral", "Qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen2", "Llama"))]
)
def test_decoders(name):
    expected, found = both(make(name, KNOWN[name]), alone=name == "Mistral", use_cache=False)
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.999


def test_an_encoder_keeps_its_embeddings():
    expected, found = both(make("Bert", SMALL, add_pooling_layer=False))
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.9999


@pytest.mark.parametrize(
    "name, config, words",
    [
        ("Gemma", DECODER, ("rsqrt at modeling_gemma.py", "more places")),
        ("Mixtral", {**DECODER, "num_local_experts": 4}, ("topk at modeling_mixtral.py", "a router of experts")),
    ],
)
def test_others_are_refused_by_node(name, config, words):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        both(make(name, config), use_cache=False)
    error = caught.value.inner_exception
    assert isinstance(error, IntegerOnlyError) and all(word in str(error) for word in words), str(error)
