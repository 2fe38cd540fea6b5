"""Smoothing: formulas, FPTQ's policy, AWQ's search, and functions that stay what they are."""

import math

import pytest
import torch

pytest.importorskip("transformers")
from intscale_compile import IntScaleConfig, IntScaleTensor  # noqa: E402
from intscale_compile.calibration import smoothing  # noqa: E402
from intscale_compile.calibration.groups import Norm, difference, scaling_groups  # noqa: E402
from intscale_compile.calibration.layers import blocks, observe_inputs, record_inputs, run_block, stages  # noqa: E402
from tests.support.calibration import logits_of, small_model  # noqa: E402


def prepared(name):
    model, inputs = small_model(name)
    block_name, block = blocks(model)[0]
    recorded = record_inputs(model, inputs)[block_name]
    weights = [weight for stage in stages(block, recorded) for weight in stage]
    return model, inputs, block, recorded, weights


def test_the_logarithmic_scale_is_the_published_one():
    absmax = torch.tensor([2.0, 14.0, 126.0, 0.0])
    scale = smoothing.logarithmic_scale(absmax)
    torch.testing.assert_close(scale[:3], torch.tensor([2 / 2, 14 / 4, 126 / 7]))
    assert 0 < float(scale[3]) < 1e-4
    # What remains of a channel is the logarithm of what it was.
    assert float(absmax[2] / scale[2]) == pytest.approx(math.log2(128))


def test_smoothquant_shares_the_range_and_does_not_depend_on_units():
    x, w = torch.tensor([16.0, 1.0]), torch.tensor([1.0, 1.0])
    scale = smoothing.smoothquant_scale(x, w, 0.5)
    assert float(scale[0] / scale[1]) == pytest.approx(4)
    torch.testing.assert_close(smoothing.smoothquant_scale(x * 100, w, 0.5), scale)
    torch.testing.assert_close(smoothing.smoothquant_scale(x, w, 0.0), torch.ones(2))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_statistics_over_two_batches_are_those_of_all_tokens(name):
    _, _, block, recorded, weights = prepared(name)
    seen = {}
    with torch.no_grad(), observe_inputs(block, weights, lambda n, e, x: seen.setdefault(n, []).append(x)):
        run_block(block, recorded)
        run_block(block, recorded)
    found = smoothing.collect_statistics(block, weights, [recorded, recorded], sample_tokens=5)
    assert set(found) == set(seen)
    for name, known in found.items():
        x = torch.cat([part.flatten(0, -2) for part in seen[name]]).abs()
        assert known.tokens == len(x)
        assert torch.equal(known.absmax, x.amax(0))
        torch.testing.assert_close(known.mean, x.mean(0))
        assert all(len(part) <= 5 for part in known.sample.values())


def test_fptq_policy_follows_the_range_of_each_layer():
    _, _, block, recorded, weights = prepared("llama")
    groups = scaling_groups(block, recorded)
    found = smoothing.collect_statistics(block, weights, [recorded])

    def policies_for(largest):
        for known in found.values():
            known.absmax = known.absmax * (largest / known.absmax.max())
        return smoothing.equalize(groups, weights, found)

    folds, policies = policies_for(14.9)
    assert not folds
    assert all(policy.static and not policy.equalized for policy in policies.values())
    assert policies["mlp.down_proj"].absmax == pytest.approx(14.9)

    folds, policies = policies_for(150.0)
    assert [isinstance(group.previous, Norm) for group, _ in folds] == [True, True]
    assert policies["self_attn.q_proj"].static and policies["self_attn.q_proj"].equalized
    assert policies["self_attn.q_proj"].absmax == pytest.approx(math.log2(152.0), rel=1e-5)
    assert not policies["mlp.down_proj"].static and not policies["mlp.down_proj"].equalized

    folds, policies = policies_for(151.0)
    assert not any(policy.static for policy in policies.values())
    assert policies["mlp.gate_proj"].equalized and len(folds) == 2


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gemma2", "bert"])
def test_fptq_keeps_the_function(name):
    model, inputs, *_ = prepared(name)
    before = logits_of(model, inputs)
    for norm in (m for n, m in model.named_modules() if "norm" in n.lower() and getattr(m, "weight", None) is not None):
        norm.weight.mul_(1 if name == "bert" else 20)  # large activations, so that equalization has to act
    before = logits_of(model, inputs)
    recorded = record_inputs(model, inputs)
    policies = {n: smoothing.smooth_fptq(block, [recorded[n]]) for n, block in blocks(model)}
    assert difference(logits_of(model, inputs), before) < 1e-5
    if name in ("llama", "mixtral", "gemma2"):
        assert all(policy["self_attn.q_proj"].equalized for policy in policies.values())
        assert not any("mlp.gate" in policy for policy in policies.values() if name == "mixtral")


def test_the_static_range_is_what_the_layer_sees_after_folding():
    model, inputs, block, recorded, weights = prepared("llama")
    block.input_layernorm.weight.mul_(20)
    policies = smoothing.smooth_fptq(block, [recorded])
    after = smoothing.collect_statistics(block, weights, [recorded])
    for name, policy in policies.items():
        assert float(after[name].absmax.max()) == pytest.approx(policy.absmax, rel=1e-4), name


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_awq_lowers_the_error_of_a_layer_with_outliers_and_keeps_the_function(name):
    model, inputs, block, recorded, _ = prepared(name)
    block.post_attention_layernorm.weight[5] = 60.0
    before = logits_of(model, inputs)
    shares = smoothing.smooth_awq(block, [recorded], IntScaleConfig(group_size=32))
    norm_share = next(share for group, share in shares.items() if group.startswith("post_attention_layernorm"))
    assert norm_share < 0.7
    assert all(share <= 1.0 for share in shares.values())
    assert difference(logits_of(model, inputs), before) < 1e-5


def test_the_error_that_awq_minimises_is_that_of_the_quantized_layer():
    _, _, block, recorded, weights = prepared("llama")
    weight = next(w for w in weights if w.name == "mlp.down_proj")
    x = torch.randn(7, 256)
    found = smoothing.quantization_error(weight, torch.ones(256), {None: x}, IntScaleConfig())
    layer = torch.nn.functional.linear(x, IntScaleTensor.from_hp(weight.weight, IntScaleConfig()))
    expected = float((layer - x @ weight.weight.mT).square().sum())
    assert found == pytest.approx(expected, rel=1e-3)
