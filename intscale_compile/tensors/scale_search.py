"""Choosing integer group scales, row scales and 4-bit codes for a weight.

The grid of integer scales is small, so it is searched exhaustively: for every candidate row scale, every integer for every
group, with the codes rounded anew against the *integer* scale each time. Rounding finished float scales to integers
instead (arXiv 2405.14597) keeps the codes and is available as ``amplifier``.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import format as fmt
from ..config import IntScaleConfig
from ..errors import OverflowProofError
from ..kernels.cpu_scale_search import search_integer_scales_cpu
from .exact_grid import SMALLEST_STEP, find_grid

# Candidate row scales, as fractions of the largest plain step of the row (absmax / 7.5) that the largest integer stands
# for. Trained weights: these 24 are within 0.01 dB of 200 candidates from 0.6 to 1.6.
ROW_FRACTIONS = tuple(0.70 + 0.02 * i for i in range(24))
# Clipping fractions tried per group (or per row) where the integer grid itself is too fine to be walked.
CLIP_FRACTIONS = tuple(0.50 + 0.025 * i for i in range(24))
MAX_EXHAUSTIVE_BITS = 4
CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}  # CPU: the working set stays in the L2 cache, which is 4x faster
FEW_ELEMENTS = 1 << 15  # of all scales together, which are then searched at once
COMPILED_CHUNK = 1 << 22  # of the compiled search on a CPU, which keeps one group in the cache
PLAIN_STEP = 7.5  # absmax / 7.5 uses the 16 codes of [-8, 7] evenly
INT8_STEP = 127.0


class QuantizedWeight(NamedTuple):
    """Codes int8 ``[..., N, Kp]``, group scales integer ``[..., N, G]``, row scales fp32 ``[..., N, 1]``, bits of the scales."""

    codes: Tensor
    group_scale: Tensor
    row_scale: Tensor
    scale_bits: int


def quantize_weight(weight: Tensor, config: IntScaleConfig) -> QuantizedWeight:
    """Quantize a finite floating point weight ``[..., N, K]`` as ``config`` says.

    Raises:
        OverflowProofError: the accumulator of some row cannot be proved free of overflow and its codes may not change.
    """
    group_size = config.effective_group_size
    in_features = weight.shape[-1]
    rows = weight.detach().reshape(-1, in_features)
    step = max(1, chunk_elements(weight, config) // max(1, in_features))
    amplifier = _amplifier(rows, config, step) if config.amplifier != "row" else None
    parts = [_found_or_searched(chunk, config, amplifier) for chunk in rows.split(step)]
    codes, group_scale, row_scale = (torch.cat(column) for column in zip(*parts))
    lead = weight.shape[:-1]
    if amplifier is not None:
        scale_bits = max(1, int(group_scale.max()).bit_length())
    else:
        scale_bits = 1 if group_size == -1 else config.scale_bits
    shaped = [fmt.contiguous(part.reshape(*lead, -1)) for part in (codes, group_scale, row_scale)]
    return QuantizedWeight(shaped[0], shaped[1], shaped[2], scale_bits)


def chunk_elements(weight: Tensor, config: IntScaleConfig) -> int:
    """How many elements of a weight are worked on at once."""
    exhaustive = config.effective_group_size != -1 and config.amplifier == "row" and config.scale_search == "mse"
    if weight.is_cpu and exhaustive and config.scale_bits <= MAX_EXHAUSTIVE_BITS:
        return COMPILED_CHUNK
    return CHUNK_ELEMENTS.get(weight.device.type, 1 << 20)


def _found_or_searched(chunk: Tensor, config: IntScaleConfig, amplifier: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`_quantize_rows` returns; rows that were quantized in this format before get what reproduces them."""
    size, bits = config.effective_group_size, config.weight_bits
    scale_max = 1 if size == -1 else (1 << config.scale_bits) - 1
    if amplifier is not None:
        found = find_grid(chunk, size, bits, torch.iinfo(torch.int16).max, 1.0 / amplifier)
    else:
        found = find_grid(chunk, size, bits, scale_max)
    if found is None:
        return _quantize_rows(chunk, config, amplifier)
    codes = found.codes.new_zeros((len(chunk), found.codes.shape[-1]))
    group_scale = found.group_scale.new_ones((len(chunk), found.group_scale.shape[-1]))
    group_scale = group_scale.to(torch.uint8 if amplifier is None else torch.int16)
    row_scale = chunk.new_ones((len(chunk), 1), dtype=torch.float32)
    codes[found.rows], row_scale[found.rows] = found.codes, found.row_scale
    group_scale[found.rows] = found.group_scale.to(group_scale.dtype)
    if not bool(found.rows.all()):
        rest = ~found.rows
        codes[rest], group_scale[rest], row_scale[rest] = _quantize_rows(chunk[rest], config, amplifier)
    return codes, group_scale, row_scale


def _quantize_rows(chunk: Tensor, config: IntScaleConfig, amplifier: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows ``[R, K]``; returns codes ``[R, Kp]``, group scales ``[R, G]``, row scales ``[R, 1]``."""
    group_size = config.effective_group_size
    wide = chunk.float()
    padded = fmt.padded_in_features(wide.shape[-1], group_size)
    wide = torch.nn.functional.pad(wide, (0, padded - wide.shape[-1]))
    # Normalised rows keep squared errors finite and make every candidate step a plain number.
    absmax = wide.abs().amax(-1, keepdim=True)
    absmax = torch.where(absmax > 0, absmax.clamp(min=SMALLEST_STEP), torch.ones_like(absmax))
    groups = (wide / absmax).unflatten(-1, (fmt.num_groups(chunk.shape[-1], group_size), -1))
    if amplifier is not None:
        return _amplified(groups, absmax, config, amplifier)
    if config.weight_bits == 8:
        return _per_channel(groups, absmax, config, INT8_STEP, -127, 127)
    if group_size == -1:
        return _per_channel(groups, absmax, config, PLAIN_STEP, fmt.CODE_MIN, fmt.CODE_MAX)
    return _searched(groups, absmax, config, (1 << config.scale_bits) - 1)


def _searched(groups: Tensor, absmax: Tensor, config: IntScaleConfig, scale_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integer scales up to ``scale_max``; rows whose proof fails are searched again in a smaller range."""
    if config.scale_search == "absmax":
        steps, scales = _absmax_scales(groups, scale_max)
    elif scale_max < 1 << MAX_EXHAUSTIVE_BITS:
        steps, scales = search_integer_scales(groups, scale_max)
    else:
        steps, scales = _clipped_scales(groups, scale_max)
    floor = SMALLEST_STEP / absmax  # where a row's scale would leave the normal range, its codes follow the floor
    scales = torch.where(steps < floor, (scales * (steps / floor)).ceil(), scales)
    steps = torch.maximum(steps, floor)
    codes = _round_codes(groups, steps * scales)
    row_scale = (steps * absmax).clamp(min=SMALLEST_STEP)
    group_scale = scales.clamp(min=1).to(torch.uint8)
    unsafe = fmt.accumulator_bound(codes, group_scale) > fmt.INT32_MAX
    if unsafe.any():
        if scale_max == 1:
            raise OverflowProofError(
                f"rows of {codes.shape[-1]} weights are too long for an int32 accumulator: split the layer."
            )
        again = _searched(groups[unsafe], absmax[unsafe], config, scale_max // 2)
        codes[unsafe], group_scale[unsafe], row_scale[unsafe] = again
    return codes, group_scale, row_scale


def search_integer_scales(groups: Tensor, scale_max: int, weights: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """Try every candidate row scale and, for each, every integer scale of every group; keep the least squared error.

    Args:
        groups: fp32 ``[R, G, g]``, rows normalised to a largest magnitude of 1.
        scale_max: largest integer scale.
        weights: fp32 ``[G, g]``, what the squared error of each column counts: mean squares of the activation. None: 1.

    Returns:
        Row steps fp32 ``[R, 1]`` (row scales of the normalised rows) and integer scales fp32 ``[R, G]``.
    """
    if groups.is_cuda:
        # Imports Triton, which only GPUs need.
        from ..kernels.triton_scale_search import search_integer_scales_gpu

        return search_integer_scales_gpu(groups, scale_max, ROW_FRACTIONS, PLAIN_STEP, weights)
    row_steps = [fraction / (PLAIN_STEP * scale_max) for fraction in ROW_FRACTIONS]
    if not groups.is_cpu:
        return _searched_by_operators(groups, scale_max, row_steps, weights)
    found = search_integer_scales_cpu(groups, scale_max, row_steps, weights)
    if found is None:
        index, scales = torch.zeros((groups.shape[0], 1), dtype=torch.int64), groups.new_ones(groups.shape[:2])
        unsure = torch.full((groups.shape[0],), -1)
    else:
        index, scales, unsure = found
    steps = torch.tensor(row_steps, dtype=groups.dtype)[index]
    left = unsure.nonzero().squeeze(1)
    if len(left):
        rows = max(1, CHUNK_ELEMENTS["cpu"] // max(1, groups[0].numel()))
        parts = [
            _searched_by_operators(groups[part], scale_max, row_steps, weights, None if found is None else unsure[part])
            for part in left.split(rows)
        ]
        steps[left], scales[left] = (torch.cat(column) for column in zip(*parts))
    return steps, scales


def _searched_by_operators(
    groups: Tensor,
    scale_max: int,
    row_steps: list[float],
    weights: Optional[Tensor],
    candidates: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """The search of ``search_integer_scales`` as operators of PyTorch.

    ``candidates``: int64 ``[R]``, a bit for each row step that is tried for the row. None: all of them.
    """
    best_total = groups.new_full((groups.shape[0], 1), float("inf"))
    best_step = torch.ones_like(best_total)
    best_scales = groups.new_ones(groups.shape[:2])
    for number, step in enumerate(row_steps):
        if candidates is None:
            total, scales = _scales_of_step(groups, step, scale_max, weights)
        else:
            tried = (candidates >> number & 1).bool()
            if not bool(tried.any()):
                continue
            total, scales = torch.full_like(best_total, float("inf")), torch.ones_like(best_scales)
            total[tried], scales[tried] = _scales_of_step(groups[tried], step, scale_max, weights)
        better = total < best_total
        best_total = torch.where(better, total, best_total)
        best_step.masked_fill_(better, step)
        best_scales = torch.where(better, scales, best_scales)
    return best_step, best_scales


def _scales_of_step(groups: Tensor, step: float, scale_max: int, weights: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared error ``[R, 1]`` of rows with one row step, and the integer scales ``[R, G]`` that make it the least."""
    if groups.numel() * scale_max <= FEW_ELEMENTS:
        return _scales_of_few_rows(groups, step, scale_max, weights)
    least = groups.new_full(groups.shape[:2], float("inf"))
    scales, work = torch.ones_like(least), torch.empty_like(groups)
    for scale in range(1, scale_max + 1):
        error = _squared_error(groups, step * scale, work, weights)
        better = error < least
        torch.where(better, error, least, out=least)
        scales.masked_fill_(better, float(scale))
    return least.sum(-1, keepdim=True), scales


def _scales_of_few_rows(
    groups: Tensor, step: float, scale_max: int, weights: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """What :func:`_scales_of_step` returns, to the bit: all scales at once, as calls cost more than what they compute."""
    numbers = range(1, scale_max + 1)
    work = torch.stack([groups * (1.0 / (step * scale)) for scale in numbers])
    work.round_().clamp_(fmt.CODE_MIN, fmt.CODE_MAX)
    for scale, codes in zip(numbers, work):
        torch.sub(groups, codes, alpha=step * scale, out=codes)
    work.square_()
    errors = (work if weights is None else work.mul_(weights)).sum(-1)
    least = errors.amin(0)
    scales = torch.arange(1.0, scale_max + 1, dtype=groups.dtype, device=groups.device).view(-1, 1, 1)
    return least.sum(-1, keepdim=True), torch.where(errors == least, scales, float(scale_max)).amin(0)


def _squared_error(groups: Tensor, step: float, work: Tensor, weights: Optional[Tensor]) -> Tensor:
    """Squared rounding error ``[R, G]`` of the groups for one step."""
    torch.mul(groups, 1.0 / step, out=work)
    work.round_().clamp_(fmt.CODE_MIN, fmt.CODE_MAX)
    torch.sub(groups, work, alpha=step, out=work)
    work.square_()
    return (work if weights is None else work.mul_(weights)).sum(-1)


def _round_codes(groups: Tensor, steps: Tensor, low: int = fmt.CODE_MIN, high: int = fmt.CODE_MAX) -> Tensor:
    """Codes int8 ``[R, G * g]`` of groups ``[R, G, g]`` for steps ``[R, G]``."""
    return (groups / steps.unsqueeze(-1)).round_().clamp_(low, high).flatten(-2).to(torch.int8)


def _absmax_scales(groups: Tensor, scale_max: int) -> tuple[Tensor, Tensor]:
    plain = groups.abs().amax(-1) / PLAIN_STEP
    steps = plain.amax(-1, keepdim=True) / scale_max
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    return steps, (plain / steps).round().clamp(1, scale_max)


def _clipped_scales(groups: Tensor, scale_max: int) -> tuple[Tensor, Tensor]:
    """Wide integer ranges: one row step, and for each group the best of the integers nearest to its clipping fractions."""
    plain = groups.abs().amax(-1) / PLAIN_STEP
    float_steps = search_float_steps(groups, plain)
    steps = float_steps.amax(-1, keepdim=True) / scale_max
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    best = (plain / steps).round().clamp(1, scale_max)
    least = _error_of_steps(groups, best * steps)
    for fraction in CLIP_FRACTIONS:
        scales = (fraction * plain / steps).round().clamp(1, scale_max)
        error = _error_of_steps(groups, scales * steps)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scales, best)
    return steps, torch.where(plain > 0, best, torch.ones_like(best))


def _error_of_steps(
    groups: Tensor, steps: Tensor, low: int = fmt.CODE_MIN, high: int = fmt.CODE_MAX, weights: Optional[Tensor] = None
) -> Tensor:
    wide = steps.clamp(min=SMALLEST_STEP).unsqueeze(-1)
    codes = (groups / wide).round_().clamp_(low, high)
    error = (groups - codes.mul_(wide)).square_()
    return (error if weights is None else error.mul_(weights)).sum(-1)


def search_float_steps(
    groups: Tensor,
    plain: Tensor,
    low: int = fmt.CODE_MIN,
    high: int = fmt.CODE_MAX,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """Best float step ``[R, G]`` of groups ``[R, G, g]`` among the clipping fractions of the plain step ``[R, G]``.

    ``weights``: fp32 ``[G, g]``, what the squared error of each column counts, or None.
    """
    best, least = plain, _error_of_steps(groups, plain, low, high, weights)
    for fraction in CLIP_FRACTIONS:
        error = _error_of_steps(groups, plain * fraction, low, high, weights)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, plain * fraction, best)
    return best


def _per_channel(
    groups: Tensor, absmax: Tensor, config: IntScaleConfig, plain_step: float, low: int, high: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One group per row, integer scale 1."""
    steps = groups.abs().amax(-1) / plain_step
    if config.scale_search == "mse":
        steps = search_float_steps(groups, steps, low, high)
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    steps = torch.maximum(steps, SMALLEST_STEP / absmax)
    codes = _round_codes(groups, steps, low, high)
    group_scale = torch.ones_like(steps, dtype=torch.uint8)
    _require_proof(codes, group_scale, "split the layer along its input")
    return codes, group_scale, (steps * absmax).clamp(min=SMALLEST_STEP)


def _amplified(groups: Tensor, absmax: Tensor, config: IntScaleConfig, amplifier: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integer Scale as published: plain codes for float scales, then scales rounded to ``1 / amplifier``."""
    steps = _float_steps(groups, config)
    codes = _round_codes(groups, torch.where(steps > 0, steps, torch.ones_like(steps)))
    scales = (steps * absmax * amplifier).round().clamp(min=1)
    if scales.max() > torch.iinfo(torch.int16).max:
        raise OverflowProofError(
            f"amplifier={amplifier} makes a group scale of {float(scales.max()):.0f}, above 16 bits: use a smaller one or 'row'."
        )
    group_scale = torch.where(steps > 0, scales, torch.ones_like(scales)).to(torch.int16)
    _require_proof(codes, group_scale, f"use a smaller amplifier than {amplifier}, or 'row'")
    return codes, group_scale, torch.full_like(absmax, 1.0 / amplifier)


def _float_steps(groups: Tensor, config: IntScaleConfig) -> Tensor:
    plain = groups.abs().amax(-1) / PLAIN_STEP
    return search_float_steps(groups, plain) if config.scale_search == "mse" else plain


def _amplifier(rows: Tensor, config: IntScaleConfig, step: int) -> int:
    """The amplifier of a whole weight; ``"layer"``: smallest power of two with every group scale at least 1 (Listing 1)."""
    if isinstance(config.amplifier, int):
        return config.amplifier
    smallest = float("inf")
    group_size = config.effective_group_size
    for chunk in rows.split(step):
        padded = fmt.padded_in_features(chunk.shape[-1], group_size)
        wide = torch.nn.functional.pad(chunk.float(), (0, padded - chunk.shape[-1]))
        steps = _float_steps(wide.unflatten(-1, (fmt.num_groups(chunk.shape[-1], group_size), -1)), config)
        steps = steps[steps > 0]
        smallest = min(smallest, float(steps.min())) if steps.numel() else smallest
    amplifier = 1
    while smallest * amplifier < 1 and amplifier < 1 << 20:
        amplifier *= 2
    return amplifier


def _require_proof(codes: Tensor, group_scale: Tensor, mend: str) -> None:
    bound = fmt.accumulator_bound(codes, group_scale)
    worst = int(bound.argmax()) if bound.numel() else 0
    if bound.numel() and int(bound[worst]) > fmt.INT32_MAX:
        raise OverflowProofError(
            f"the int32 accumulator of a row could reach {int(bound[worst])}, over 2**31 - 1, and its codes are fixed: {mend}."
        )
