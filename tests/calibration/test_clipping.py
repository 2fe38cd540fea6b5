"""Choosing steps: the searches weighted by activations, learned clipping, and the way to the integer grid."""

from __future__ import annotations

import pytest
import torch

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.calibration.clipping import (
    choose_steps,
    code_range,
    into_groups,
    learn_steps,
    nearest_integer_steps,
    on_integer_grid,
)

CONFIGS = {
    "g128": IntScaleConfig(),
    "g32": IntScaleConfig(group_size=32),
    "s2": IntScaleConfig(scale_bits=2),
    "channel": IntScaleConfig(group_size=-1),
    "w8a8": IntScaleConfig(weight_bits=8, group_size=-1),
}


def weight_of(rows: int = 16, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns) * torch.randn(rows, 1).exp()


def moments(columns: int = 256) -> torch.Tensor:
    x = (torch.randn(1000, 64) @ torch.randn(64, columns) + torch.randn(1000, columns)) * torch.randn(columns).exp()
    return x.mT @ x


def rounding_error(weight, steps, config) -> torch.Tensor:
    groups, wide = into_groups(weight, config), steps.unsqueeze(-1)
    return (groups - (groups / wide).round().clamp(*code_range(config)) * wide).flatten(-2)


def output_error(weight, steps, hessian, config) -> torch.Tensor:
    error = rounding_error(weight, steps, config)
    return (error @ hessian * error).sum(-1)


@pytest.mark.parametrize("name", ["g128", "g32", "s2", "channel", "w8a8"])
def test_without_activations_the_search_is_that_of_quantize(name):
    config, weight = CONFIGS[name], weight_of()
    steps = choose_steps(weight, config, None, integer=True)
    tensor = IntScaleTensor.from_hp(weight, config)
    wanted = tensor.row_scale * tensor.group_scale
    torch.testing.assert_close(steps, wanted.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_weighted_search_lowers_the_weighted_error(name, integer):
    config, weight = CONFIGS[name], weight_of()
    importance = torch.randn(256).mul(2).exp()
    plain = choose_steps(weight, config, None, integer=integer)
    chosen = choose_steps(weight, config, importance, integer=integer)
    before, after = ((rounding_error(weight, steps, config).square() * importance).sum() for steps in (plain, chosen))
    assert after < before
    assert rounding_error(weight, chosen, config).square().sum() > rounding_error(weight, plain, config).square().sum()


def test_rows_are_searched_alone():
    weight = weight_of(600)
    importance = torch.rand(256)
    whole = choose_steps(weight, IntScaleConfig(), importance, integer=True)
    assert torch.equal(whole[17:19], choose_steps(weight[17:19], IntScaleConfig(), importance, integer=True))


@pytest.mark.parametrize("name", ["channel", "g128", "g32"])
def test_learned_clipping_lowers_the_output_error_of_every_row(name):
    config, weight, hessian = CONFIGS[name], weight_of(), moments()
    searched = choose_steps(weight, config, hessian.diagonal(), integer=False)
    learned = learn_steps(weight, searched, hessian, config)
    before, after = (output_error(weight, steps, hessian, config) for steps in (searched, learned))
    assert (after <= before * 1.00001).all() and after.sum() < 0.97 * before.sum()


def test_learned_clipping_repeats():
    weight, hessian = weight_of(), moments()
    steps = choose_steps(weight, IntScaleConfig(), None, integer=False)
    results = [learn_steps(weight, steps, hessian, IntScaleConfig()) for _ in range(2)]
    assert torch.equal(*results)


def test_integer_steps_are_integers_times_a_row_scale():
    config, weight, hessian = IntScaleConfig(group_size=32), weight_of(), moments()
    steps = learn_steps(weight, choose_steps(weight, config, None, integer=False), hessian, config)
    found = nearest_integer_steps(weight, steps, config, hessian.diagonal())
    codes = (into_groups(weight, config) / found.unsqueeze(-1)).round().clamp(-8, 7).flatten(-2).to(torch.int8)
    tensor = IntScaleTensor.from_codes(codes, found, group_size=32, scale_bits=4, dtype=torch.float32)
    assert int(tensor.group_scale.max()) <= 15
    torch.testing.assert_close(tensor.row_scale * tensor.group_scale, found, rtol=1e-6, atol=0)


def test_zero_rows_and_columns():
    weight = weight_of()
    weight[3] = 0
    weight[:, 128:] = 0
    for integer in (True, False):
        steps = choose_steps(weight, IntScaleConfig(), torch.zeros(256), integer=integer)
        assert torch.isfinite(steps).all() and (steps > 0).all()


def test_which_formats_are_on_the_integer_grid():
    assert all(on_integer_grid(config) for config in CONFIGS.values())
    off = (IntScaleConfig(scale_bits=8), IntScaleConfig(amplifier=1024), IntScaleConfig(amplifier="layer"))
    assert not any(on_integer_grid(config) for config in off)
