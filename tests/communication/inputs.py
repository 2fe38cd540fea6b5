"""Inputs of quantized collectives, and comparisons."""

from __future__ import annotations

import torch


def contributions(
    elements: int, ranks: int, dtype: torch.dtype = torch.float32, special: bool = False
) -> list[torch.Tensor]:
    """Normal data for every rank; with ``special`` also constants, zeros of both signs, NaN, Inf and the largest numbers."""
    inputs = []
    for rank in range(ranks):
        x = torch.randn(elements, generator=torch.Generator().manual_seed(1000 * elements + rank))
        if special:
            x[:40] = 0.25
            x[40:80] = torch.tensor([0.0, -0.0]).repeat(20)
            x[80:90] = 1e-30
            if elements > 3000:
                x[384:800] = -3.75
                x[1000], x[1500 + 300 * rank], x[2900] = float("nan"), float("-inf"), float("inf")
                x[2000:2010], x[2010:2020] = 6e4, -6e4
                if dtype is not torch.float16:
                    x[3100], x[3101] = 3.3e38, -3.3e38
        inputs.append(x.to(dtype))
    return inputs


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the bit, signs of zeros included; any NaN equals any other."""
    if (
        found.dtype != expected.dtype
        or found.shape != expected.shape
        or not torch.equal(found.isnan(), expected.isnan())
    ):
        return False
    integer = {4: torch.int32, 2: torch.int16}[found.element_size()]
    kept = ~found.isnan()
    return torch.equal(found[kept].view(integer), expected[kept].view(integer))
