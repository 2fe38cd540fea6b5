"""Clipping learned on a block's output: what is learned, for which weights, and that it lowers the block's error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

from intscale_compile import CalibrationConfig, IntScaleConfig, calibrate
from intscale_compile.calibration import block_clipping
from intscale_compile.calibration.block_clipping import learn_block_steps
from intscale_compile.calibration.clipping import code_range, into_groups
from intscale_compile.calibration.layers import blocks, linears, record_inputs, run_block
from tests.support.calibration import small_model


def rounded_block(block, weights, steps, configs):
    parameters = {}
    for weight in weights:
        groups, wide = into_groups(weight.weight.float(), configs[weight.name]), steps[weight.name].unsqueeze(-1)
        dense = ((groups / wide).round().clamp(*code_range(configs[weight.name])) * wide).flatten(-2)
        parameters[weight.qualified] = dense.mT if weight.transposed else dense
    return lambda inputs: functional_call(block, parameters, *inputs)


def test_the_gradient_reaches_the_outermost_codes():
    x = torch.tensor([-8.6, -8.5, -8.0, 0.4, 7.0, 7.4, 7.6], requires_grad=True)
    codes = block_clipping.rounded_within(x, -8, 7)
    codes.sum().backward()
    assert codes.tolist() == [-8, -8, -8, 0, 7, 7, 7] and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_lowers_the_error_of_the_block(name, monkeypatch):
    monkeypatch.setattr(block_clipping, "LEARNING_STEPS", 60)
    model, inputs = small_model(name)
    path, block = blocks(model)[0]
    recorded = record_inputs(model, inputs)[path]
    weights = list(linears(block, recorded).values())
    configs = {weight.name: IntScaleConfig(group_size=-1) for weight in weights}
    target = run_block(block, recorded)
    steps = learn_block_steps(block, {w: configs[w.name] for w in weights}, [lambda: recorded], [target], 0)
    start = {w.name: block_clipping._Clipped(w, configs[w.name]).steps().detach() for w in weights}
    assert set(steps) == set(start) and all(steps[name].shape == start[name].shape for name in steps)

    def error(some):
        output = rounded_block(block, weights, some, configs)(recorded)
        return float(((output if isinstance(output, torch.Tensor) else output[0]) - target).square().sum())

    assert error(steps) < 0.75 * error(start)
    for weight in weights:  # never beyond the range
        assert (steps[weight.name] <= weight.weight.abs().amax(-1, keepdim=True) / 7 * 1.0001).all()


def test_as_a_choice_of_calibrate(monkeypatch):
    monkeypatch.setattr(block_clipping, "LEARNING_STEPS", 3)
    model, inputs = small_model("llama")
    seen = []
    learn = block_clipping.learn_block_steps

    def spy(*args):
        seen.append(learn(*args))
        return seen[-1]

    monkeypatch.setattr("intscale_compile.calibration.pipeline.learn_block_steps", spy)
    w8 = {"down_proj": IntScaleConfig(weight_bits=8, group_size=-1)}
    for size in (-1, 32):
        config = CalibrationConfig("x", IntScaleConfig(group_size=size), overrides=w8, clipping="block")
        found = copy.deepcopy(model)
        calibrate(found, [inputs], config, progress=False)
        steps = seen.pop()
        weight = found.model.layers[-1].self_attn.q_proj.weight
        assert "mlp.down_proj" not in steps and found.model.layers[-1].mlp.down_proj.weight.weight_bits == 8
        if size == -1:
            torch.testing.assert_close(weight.row_scale * weight.group_scale, steps["self_attn.q_proj"])
        else:  # the integers that come closest
            found_steps = weight.row_scale * weight.group_scale
            assert weight.group_scale.max() <= 15 and (found_steps / steps["self_attn.q_proj"]).log().abs().mean() < 0.1
