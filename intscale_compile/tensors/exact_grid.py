"""Rows that were quantized before: scales and codes that reproduce them to the bit, where there are any.

A weight that was dequantized and is quantized again (an adapter merged into it, a model converted twice) lies on a grid already.
The search of ``scale_search`` tries no row scale that belongs to it; here the grid is read off the numbers. Of every group the
largest step that all its entries are multiples of, of every row the largest step that all group steps are multiples of, and then
the fp32 row scale that rounds to every entry. What is found is verified: it reproduces the row or does not count.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import format as fmt

SIGNIFICANT_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
LOOKED_AT = 32  # columns of a row that tell whether it is worth while
SMALLEST_STEP = 2.0**-126
LARGEST_DISTANCE = 0.2  # from an integer, of what counts as one


class Found(NamedTuple):
    """Rows ``[R]`` (bool) that lie on a grid; of these codes ``[F, Kp]``, integer scales ``[F, G]``, row scales ``[F, 1]``."""

    rows: Tensor
    codes: Tensor
    group_scale: Tensor
    row_scale: Tensor


def find_grid(
    weight: Tensor, group_size: int, weight_bits: int, scale_max: int, row_scale: Optional[float] = None
) -> Optional[Found]:
    """Rows of a weight that some row scale, integer group scales and codes reproduce to the bit, proved free of overflow.

    Args:
        weight: fp32, bf16 or fp16 ``[R, K]``, finite.
        group_size: as of the format.
        weight_bits: 4 or 8.
        scale_max: largest group scale.
        row_scale: the row scale where it is given.

    Returns:
        None where there are no such rows. Rows of zeros do not count.
    """
    bits = SIGNIFICANT_BITS.get(weight.dtype)
    if bits is None:
        return None
    high = 127 if weight_bits == 8 else fmt.CODE_MAX
    largest = 127 if weight_bits == 8 else -fmt.CODE_MIN
    padded = fmt.padded_in_features(weight.shape[-1], group_size)
    wide = torch.nn.functional.pad(weight, (0, padded - weight.shape[-1]))
    groups = wide.unflatten(-1, (fmt.num_groups(weight.shape[-1], group_size), -1))
    likely = (_group_steps(groups[:, :1, :LOOKED_AT].double(), largest, bits) >= 0).all(-1)
    if not bool(likely.any()):
        return None
    chosen = groups[likely].double()
    steps = _group_steps(chosen, largest, bits)
    good = (steps >= 0).all(-1) & (steps > 0).any(-1)
    scales, codes = _integers(chosen, steps.clamp(min=0), high, scale_max, row_scale, bits)
    good &= (scales > 0).all(-1)
    if not bool(good.any()):
        return None
    # Only rows that have scales: each of the others would be tried with every factor.
    scales, row, same = _with_row_scale(groups[likely][good], scales[good], codes[good], scale_max, row_scale, bits)
    codes = codes[good].flatten(-2).to(torch.int8)
    same &= row.squeeze(-1) >= SMALLEST_STEP
    same &= fmt.accumulator_bound(codes, scales.long()) <= fmt.INT32_MAX
    if not bool(same.any()):
        return None
    good[good.clone()] = same
    rows = likely.clone()
    rows[likely] = good
    return Found(rows, codes[same], scales[same].long(), row[same])


def _group_steps(groups: Tensor, largest: int, bits: int) -> Tensor:
    """The largest step of each group ``[R, G]`` that its entries are multiples of; 0 of zeros, -1 where there is none."""
    top = groups.abs().amax(-1)
    found = torch.where(top > 0, -1.0, 0.0).double()
    for multiple in range(1, largest + 1):
        distance = multiple * 2.0 ** (1 - bits) + 1e-4
        if distance > LARGEST_DISTANCE:
            break
        step = (top / multiple).clamp(min=1e-300)
        scaled = groups / step.unsqueeze(-1)
        whole = scaled.round()
        fits = ((scaled - whole).abs().amax(-1) < distance) & (found < 0)
        better = (groups * whole).sum(-1) / whole.square().sum(-1).clamp(min=1)  # least squares: roundings average out
        found = torch.where(fits, better, found)
    return found


def _integers(
    groups: Tensor, steps: Tensor, high: int, scale_max: int, row_scale: Optional[float], bits: int
) -> tuple[Tensor, Tensor]:
    """Group scales ``[R, G]`` (0: none) and codes ``[R, G, g]`` for group steps ``[R, G]``."""
    codes = (groups / torch.where(steps > 0, steps, 1.0).unsqueeze(-1)).round()
    limits = codes.amax(-1), -codes.amin(-1)
    top = steps.amax(-1, keepdim=True).clamp(min=1e-300)
    scales, factors = torch.zeros_like(steps), torch.ones_like(steps)
    largest = 1 if row_scale is not None else (high + 1) * scale_max
    for multiple in range(1, largest + 1):
        open_rows = (scales == 0).any(-1)
        if not bool(open_rows.any()):
            break
        ratio = steps / row_scale if row_scale is not None else steps / top * multiple
        whole = ratio.round()
        distance = (whole * 2.0 ** (1 - bits) + 1e-6).clamp(max=0.05)
        fits = open_rows & (((ratio - whole).abs() < distance) & ((whole > 0) | (steps == 0))).all(-1)
        if bool(fits.any()):
            scale, factor = _divided(whole[fits], limits[0][fits], limits[1][fits], high, scale_max)
            scales[fits], factors[fits] = scale, factor
    return scales, codes * factors.unsqueeze(-1)


def _divided(whole: Tensor, above: Tensor, below: Tensor, high: int, scale_max: int) -> tuple[Tensor, Tensor]:
    """Write integers as ``scale * factor``, the codes times ``factor`` staying in range; scale 0 where that is impossible."""
    scales, factors = torch.zeros_like(whole), torch.ones_like(whole)
    low = high if high == 127 else high + 1
    for factor in range(1, high + 2):
        scale = (whole / factor).clamp(min=1)  # zeros: 1
        fits = ((scale == scale.round()) & (scale <= scale_max)) & (above * factor <= high) & (below * factor <= low)
        new = fits & (scales == 0)
        scales, factors = torch.where(new, scale, scales), torch.where(new, float(factor), factors)
    scales[(scales == 0).any(-1)] = 0
    return scales, factors


def _with_row_scale(
    groups: Tensor, scales: Tensor, codes: Tensor, scale_max: int, row_scale: Optional[float], bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Group scales, fp32 row scales ``[R, 1]``, and for which rows they reproduce the groups.

    Group scales that all have a factor in common are tried with it too: a third of an fp32 number is seldom one.
    """
    exact = codes * scales.unsqueeze(-1)
    if row_scale is not None:
        row, done = _verified(groups, exact.float(), exact.new_full((len(exact), 1), row_scale).float(), 0)
        return scales, row, done
    result, row = scales, torch.ones_like(scales[:, :1], dtype=torch.float32)
    done = torch.zeros(len(scales), dtype=torch.bool, device=scales.device)
    for factor in range(1, int(scale_max // scales.amax(-1).min()) + 1):
        fits = ~done & (scales.amax(-1) * factor <= scale_max)
        if not bool(fits.any()):
            break
        finer = exact[fits] * factor
        found, same = _verified(groups[fits], finer.float(), _row_scale(groups[fits].double(), finer, bits))
        taken = fits.clone()
        taken[fits] = same
        row[taken], result = found[same], torch.where(taken.unsqueeze(-1), scales * factor, result)
        done |= taken
    return result, row, done


def _row_scale(groups: Tensor, exact: Tensor, bits: int) -> Tensor:
    """The middle of the row scales ``[R, 1]`` whose products round to every entry, fp32."""
    size, whole = groups.abs().flatten(-2), exact.abs().flatten(-2)
    half = torch.ldexp(torch.ones_like(size), torch.frexp(size)[1] - bits - 1)
    there = whole > 0
    low = torch.where(there, (size - half) / whole, 0.0).amax(-1, keepdim=True)
    high = torch.where(there, (size + half) / whole, float("inf")).amin(-1, keepdim=True)
    return ((low + high) / 2).float()


def _verified(groups: Tensor, exact: Tensor, row: Tensor, distances: int = 4) -> tuple[Tensor, Tensor]:
    """Row scales ``[R, 1]``, a few units in the last place further where that is needed, and which rows they reproduce."""
    result, done = row, torch.zeros_like(row, dtype=torch.bool)
    candidate = {sign: row for sign in (-1.0, 1.0)}
    for distance in range(max(1, distances)):
        for sign in (1.0, -1.0) if distance else (1.0,):
            if distance:
                candidate[sign] = torch.nextafter(candidate[sign], torch.full_like(row, sign * float("inf")))
            now = candidate[sign]
            products = (exact * now.unsqueeze(-1)).to(groups.dtype)
            same = (products == groups).flatten(1).all(-1, keepdim=True) & ~done
            result, done = torch.where(same, now, result), done | same
        if bool(done.all()):
            break
    return result, done.squeeze(-1)
