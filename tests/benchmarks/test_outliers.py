"""Outliers are put in, and nothing else changes."""

import pytest
import torch

pytest.importorskip("transformers")
from intscale_compile.calibration.groups import difference  # noqa: E402
from tests.support.benchmarks import inject_outliers  # noqa: E402
from tests.support.calibration import logits_of, small_model  # noqa: E402


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "gpt2", "opt", "phi"])
def test_the_function_stays(name):
    model, inputs = small_model(name)
    before = logits_of(model, inputs)
    factors = inject_outliers(model, fraction=0.03, batch=inputs)
    assert difference(logits_of(model, inputs), before) < 1e-5
    for factor in factors.values():
        outliers = factor[factor != 1]
        assert len(outliers) == round(0.03 * len(factor))
        assert bool(((outliers >= 8) & (outliers <= 64)).all())


def test_norm_weights_grow_and_columns_shrink_router_included():
    model, inputs = small_model("mixtral")
    layer = model.model.layers[1]
    weights = [layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj]
    norm, before = layer.post_attention_layernorm.weight.clone(), [w.clone() for w in weights]
    factor = inject_outliers(model, batch=inputs)["model.layers.1.post_attention_layernorm"]
    assert int((factor != 1).sum()) == 1
    torch.testing.assert_close(layer.post_attention_layernorm.weight, norm * factor)
    for weight, old in zip(weights, before):
        torch.testing.assert_close(weight, old / factor)


def test_the_seed_decides():
    def factors(seed):
        torch.manual_seed(0)
        return torch.cat(list(inject_outliers(small_model("llama")[0], seed=seed).values()))

    assert torch.equal(factors(1), factors(1))
    assert not torch.equal(factors(1), factors(2))
