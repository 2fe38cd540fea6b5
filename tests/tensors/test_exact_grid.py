"""A weight that was quantized before is found on its grid: quantizing what was dequantized changes no bit of it."""

from __future__ import annotations

import pytest
import torch

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.tensors import exact_grid
from intscale_compile.tensors.exact_grid import find_grid

FORMATS = {
    "default": {},
    "32": {"group_size": 32},
    "256": {"group_size": 256},
    "channel": {"group_size": -1},
    "w8": {"weight_bits": 8},
    "3-bit scales": {"scale_bits": 3, "group_size": 64},
    "8-bit scales": {"scale_bits": 8},
    "amplifier": {"amplifier": 1024},
    "layer": {"amplifier": "layer"},
    "absmax": {"scale_search": "absmax"},
    "absmax 8": {"scale_search": "absmax", "scale_bits": 8},
}


def _weight(dtype=torch.float32):
    weight = torch.randn(48, 320) * torch.rand(48, 1) * 0.05
    weight[3] = 0
    weight[5, :128] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("fields", FORMATS.values(), ids=FORMATS)
def test_quantized_again_is_the_same_weight(fields):
    config = IntScaleConfig(**fields)
    dense = IntScaleTensor.from_hp(_weight(), config).dequantize()
    again = IntScaleTensor.from_hp(dense, config).validate()
    assert torch.equal(again.dequantize(), dense)
    assert again.scale_bits == IntScaleTensor.from_hp(_weight(), config).scale_bits or config.amplifier == "layer"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    """Rounding to 16 bits hides the row scale; for nearly all rows some number within its reach gives the same weight."""
    for config in (IntScaleConfig(), IntScaleConfig(group_size=-1)):
        dense = IntScaleTensor.from_hp(_weight(dtype), config).dequantize()
        again = IntScaleTensor.from_hp(dense, config).dequantize()
        assert int((again == dense).all(-1).sum()) >= 46


def test_rows_that_lie_on_no_grid_are_searched_as_ever():
    config, fresh = IntScaleConfig(), _weight()
    assert find_grid(fresh, 128, 4, 15) is None
    dense = IntScaleTensor.from_hp(fresh, config).dequantize()
    mixed = dense.clone()
    mixed[7] += 1e-4 * torch.randn(320)
    again = IntScaleTensor.from_hp(mixed, config).dequantize()
    others = torch.arange(48) != 7
    assert torch.equal(again[others], dense[others])
    assert torch.equal(again[7], IntScaleTensor.from_hp(mixed[7:8], config).dequantize()[0])


def test_a_coarse_row_is_written_with_scales_in_range():
    """All entries multiples of 105 steps: no 4-bit scale is 105, but 15 times a code of 7 is."""
    row = torch.zeros(1, 256)
    step = torch.tensor(0.001)
    row[0, :128:3], row[0, 128::5] = 105 * step, step
    found = find_grid(row, 128, 4, 15)
    assert found is not None and int(found.group_scale.max()) <= 15
    assert torch.equal(IntScaleTensor.from_hp(row, IntScaleConfig()).dequantize(), row)
    assert find_grid(row, 128, 4, 14) is None  # 105 has no divisor from 15 to 14 whose codes fit


def test_rows_without_scales_are_not_tried_with_every_factor(monkeypatch):
    """Of bf16 values on a grid of 8-bit scales most rows have none: 512 x 2048 took 29 s, one layer of a small model."""
    tried = []
    original = exact_grid._with_row_scale

    def spy(groups, scales, *arguments):
        tried.append(len(scales))
        return original(groups, scales, *arguments)

    monkeypatch.setattr(exact_grid, "_with_row_scale", spy)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 2, 128), generator=generator)
    fine = torch.tensor([[37, 251]]).expand(6, 2)
    coarse = torch.tensor([[3, 2]]).expand(6, 2)
    scales = torch.where(torch.arange(6)[:, None] < 4, fine, coarse)
    weight = (codes * scales.unsqueeze(-1) * 3e-4).flatten(1).bfloat16()
    found = exact_grid.find_grid(weight, 128, 4, 15)
    assert found is not None and found.rows.tolist() == [False] * 4 + [True] * 2
    assert tried == [2]
    restored = (found.codes.view(2, 2, 128) * found.group_scale.unsqueeze(-1) * found.row_scale.unsqueeze(-1)).flatten(
        1
    )
    assert torch.equal(restored.bfloat16(), weight[4:])
