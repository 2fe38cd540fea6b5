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


def test_the_outlier_scale_moves_outliers_alone():
    absmax = torch.tensor([1.0, 1.5, 2.0, 3.0, 80.0])
    scale = smoothing.outlier_scale(absmax)
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 1.0, 1.0, 20.0]))
    torch.testing.assert_close(smoothing.outlier_scale(10 * absmax), scale)  # whatever the unit
    assert torch.isfinite(smoothing.outlier_scale(torch.zeros(4))).all()


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
    assert policies["mlp.down_proj"].absmax == policies["mlp.down_proj"].limit == pytest.approx(14.9)

    folds, policies = policies_for(150.0)
    assert [isinstance(group.previous, Norm) for group, _ in folds] == [True, True]
    assert policies["self_attn.q_proj"].static and policies["self_attn.q_proj"].equalized
    assert policies["self_attn.q_proj"].absmax == pytest.approx(math.log2(152.0), rel=1e-5)
    assert not policies["mlp.down_proj"].static and not policies["mlp.down_proj"].equalized

    folds, policies = policies_for(151.0)
    assert not any(policy.static for policy in policies.values())
    assert policies["mlp.gate_proj"].equalized and len(folds) == 2
    folds, policies = smoothing.equalize(
        groups, weights, found, published=True
    )  # the paper leaves these to their tokens
    assert not folds and not any(policy.static or policy.equalized for policy in policies.values())


@pytest.mark.parametrize("scale", smoothing.EQUALIZATIONS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gemma2", "bert"])
def test_fptq_keeps_the_function(name, scale):
    model, inputs, *_ = prepared(name)
    before = logits_of(model, inputs)
    for norm in (m for n, m in model.named_modules() if "norm" in n.lower() and getattr(m, "weight", None) is not None):
        norm.weight.mul_(1 if name == "bert" else 20)  # large activations, so that equalization has to act
    before = logits_of(model, inputs)
    recorded = record_inputs(model, inputs)
    scale_of = smoothing.EQUALIZATIONS[scale]
    policies = {n: smoothing.smooth_fptq(block, [recorded[n]], scale_of) for n, block in blocks(model)}
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


def test_a_static_scale_saturates_where_the_error_is_least():
    rows = 8 * torch.rand(1024, 32) - 4  # evenly spread: nothing to saturate
    assert smoothing.least_error_limit(rows, float(rows.abs().max())) == float(rows.abs().max())
    rows[5, 7] = 24.0  # one entry, which the scale of all others need not reach
    limit = smoothing.least_error_limit(rows, 24.0)
    errors = {f: float((smoothing.rounded_statically(rows, 24 * f) - rows).square().sum()) for f in (1.0, limit / 24)}
    assert limit < 24 and errors[limit / 24] < 0.9 * errors[1.0]
    assert smoothing.least_error_limit(torch.zeros(3, 4), 0.0) == 0.0
    assert float(smoothing.rounded_statically(torch.tensor([-9.0, 9.0, 0.25]), 3.0).abs().max()) == 3.0


def test_static_limits_come_from_the_equalized_input():
    _, _, block, recorded, weights = prepared("llama")
    block.input_layernorm.weight.mul_(20)
    policies = smoothing.smooth_fptq(block, [recorded])
    after = smoothing.collect_statistics(block, weights, [recorded], smoothing.STATIC_TOKENS)
    for name, policy in policies.items():
        if policy.static:
            expected = smoothing.least_error_limit(after[name].sample[None], policy.absmax)
            assert policy.limit == pytest.approx(expected, rel=1e-4), name
    assert policies["self_attn.q_proj"].equalized and policies["self_attn.q_proj"].static
    assert policies["self_attn.q_proj"].limit == policies["self_attn.v_proj"].limit  # siblings share a quantization
    published = smoothing.smooth_fptq(block, [recorded], published=True)
    assert all(policy.limit == policy.absmax for policy in published.values())


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
