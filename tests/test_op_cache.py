"""Unpacked weights that the CPU ops keep follow every change of a weight and die with it.

Eight tokens: fewer may be multiplied with the packed weight, of which nothing is kept.
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.kernels import cpu_gemm
from intscale_compile.kernels.w4a8_linear import reference_accumulate
from tests.support.problems import LAYOUTS, Problem


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[6]], ids=["fold", "accumulate"])
@pytest.mark.parametrize("part", [0, 1], ids=["codes", "scales"])
def test_cache_follows_changes_of_the_parts(layout, part):
    """Codes are unpacked once and kept; a change in place of either stored tensor must be seen by the next call."""
    problem, other = Problem(8, 64, 256, layout), Problem(8, 64, 256, layout, seed=1)
    assert torch.equal(problem.accumulate().long(), problem.accumulator)
    problem.weight[part].copy_(other.weight[part])
    changed = reference_accumulate(problem.xq, *problem.weight, 64, layout[0], "plain")
    assert not torch.equal(changed.long(), problem.accumulator)
    assert torch.equal(problem.accumulate(), changed)


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
@pytest.mark.parametrize("scale_bits", [4, 8])
@pytest.mark.parametrize("packing", ["plain", "tiled"])
def test_cache_follows_changes_of_the_weight(packing, scale_bits, inference):
    """Through copy_ of the whole (load_state_dict) and of a slice (a loader of shards), also of inference tensors.

    Autograd's version counters see neither: the copy happens below it, and slices of the parts have their own.
    """
    config = IntScaleConfig(scale_bits=scale_bits, packing_format=packing, scale_search="absmax")
    with torch.inference_mode(inference):
        weight, second, third = (IntScaleTensor.from_hp(torch.randn(128, 256), config) for _ in range(3))
        x = torch.randn(8, 256)
        F.linear(x, weight)
        weight.copy_(second)
        assert torch.equal(F.linear(x, weight), F.linear(x, second))
        weight[64:].copy_(third[64:])
        assert torch.equal(F.linear(x, weight), torch.cat([F.linear(x, second)[:, :64], F.linear(x, third)[:, 64:]], 1))
        kept = weight[:64]
        F.linear(x, kept)
        weight.copy_(third)
        assert torch.equal(F.linear(x, kept), F.linear(x, third)[:, :64]), "a view that was used before the change"


def test_cache_follows_load_state_dict():
    layers = [torch.nn.Linear(256, 64) for _ in range(2)]
    for layer in layers:
        layer.weight = torch.nn.Parameter(IntScaleTensor.from_hp(layer.weight.detach()), requires_grad=False)
    x = torch.randn(8, 256)
    layers[0](x)
    counted = layers[0].weight.qdata._version
    layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(layers[0](x), layers[1](x))
    assert layers[0].weight.qdata._version > counted, "compiled graphs look at this counter too"


def test_cache_is_used_and_freed():
    problem = Problem(8, 64, 256, LAYOUTS[2])
    problem.accumulate()
    kept = cpu_gemm._unpacked[problem.weight[0]]
    problem.accumulate()
    assert cpu_gemm._unpacked[problem.weight[0]] is kept
    gc.collect()
    before = len(cpu_gemm._unpacked)
    del problem
    gc.collect()
    assert len(cpu_gemm._unpacked) == before - 1, "unpacked weights must not outlive the weight"
