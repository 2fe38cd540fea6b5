"""Weights that another tool quantized: the codes stay, the float group scales become integers row by row.

A GPTQ, AWQ or compressed-tensors checkpoint holds codes and one float scale per group. ``amplifier="row"`` gives every
output row a float scale of its own and writes the group scales of the row as integers of ``scale_bits`` bits, each
at least 1; an integer ``amplifier`` (or ``"layer"``, the heuristic of its Listing 1) is the published scheme of Integer
Scale (arXiv 2405.14597): ``round(scale * amplifier)``. No code is rounded again, so nothing of the calibration behind
the codes is lost but the rounding of the scales, which :func:`scale_rounding_snr` reports.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

import torch
from torch import Tensor

from .. import format as fmt
from ..config import GROUP_SIZES
from ..errors import ConfigError, OverflowProofError, WeightError
from .scale_search import SMALLEST_STEP

if TYPE_CHECKING:
    from .intscale_tensor import IntScaleTensor

# Integers tried for the largest group scale of a row, counted down from the largest that there is; the others follow.
ROW_CANDIDATES = 32
TOO_FAR = (
    "a group's minimum is too large beside its scale for 16 bits and an int32 accumulator: quantize the weight anew."
)
AMPLIFIER_SCALE_MAX = torch.iinfo(torch.int16).max


class _Codes(NamedTuple):
    """Codes int8 ``[N, Kp]``, float64 group scales ``[N, G]``, zero points int8 or None, ``K``, minima float64 or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Optional[Tensor]
    in_features: int
    minimum: Optional[Tensor] = None

    def centered(self) -> Tensor:
        """Codes less their zero points; 0 in the padding."""
        if self.zero_point is None:
            return self.codes
        centered = fmt.centered_codes(self.codes, self.zero_point)
        centered[..., self.in_features :] = 0
        return centered

    def rows(self, chosen: Tensor) -> _Codes:
        """Some of the rows."""
        parts = (None if part is None else part[chosen] for part in (self.zero_point, self.minimum))
        zero_point, minimum = parts
        return _Codes(self.codes[chosen], self.scale[chosen], zero_point, self.in_features, minimum)

    def offset(self, row_scale: Tensor) -> Optional[Tensor]:
        """Minima in units of the row scale, with their sign changed, float64 ``[N, G]``; None where there are none."""
        return None if self.minimum is None else (self.minimum / -row_scale).round()

    def bound(self, integers: Tensor, row_scale: Tensor) -> Tensor:
        """Largest magnitude of each row's accumulator, int64 ``[N]``."""
        offset = self.offset(row_scale)
        if offset is None:
            return fmt.accumulator_bound(self.centered(), integers)
        return fmt.accumulator_bound(self.codes, integers, offset, self.in_features)


class IntegerWeight(NamedTuple):
    """One matrix with integer group scales: codes int8 ``[N, Kp]``, group scales ``[N, G]``, row scales fp32 ``[N, 1]``."""

    codes: Tensor
    group_scale: Tensor
    row_scale: Tensor
    zero_point: Optional[Tensor]
    scale_bits: int


def integer_weight(
    codes: Tensor,
    group_scale: Tensor,
    zero_point: Optional[Tensor],
    group_size: int,
    scale_bits: int,
    amplifier: Union[str, int],
    weight_bits: int,
    name: str,
    minimum: Optional[Tensor] = None,
) -> IntegerWeight:
    """The parts of one matrix, for arguments as of ``IntScaleTensor.from_codes`` that ``check_from_codes`` has seen.

    Raises:
        WeightError, OverflowProofError: as there.
    """
    weight = _checked(codes, group_scale, zero_point, group_size, weight_bits, name)
    if minimum is not None:
        weight = weight._replace(minimum=_checked_minimum(minimum, group_scale, weight.scale.shape[-1], name))
    weight = _positive(_without_zero_scales(weight), weight_bits, name)
    if amplifier == "row":
        integers, row_scale = _row_by_row(weight, (1 << scale_bits) - 1, name)
        bits = 1 if group_size == -1 else scale_bits
    else:
        integers, row_scale = _amplified(weight, amplifier, name)
        bits = max(1, int(integers.max()).bit_length())
    row_scale = row_scale.clamp(min=SMALLEST_STEP).to(torch.float32)
    zero_point = weight.zero_point if minimum is None else _stored_offset(weight, row_scale, name)
    return IntegerWeight(
        fmt.contiguous(weight.codes),
        fmt.contiguous(integers.to(torch.uint8 if bits <= 8 else torch.int16)),
        fmt.contiguous(row_scale),
        None if zero_point is None else fmt.contiguous(zero_point),
        bits,
    )


def _stored_offset(weight: _Codes, row_scale: Tensor, name: str) -> Tensor:
    """Offsets int16 ``[N, G]`` of the minima."""
    offset = weight.offset(row_scale.double())
    assert offset is not None
    if float(offset.abs().max()) > torch.iinfo(torch.int16).max:
        raise WeightError(f"{name}: {TOO_FAR}")
    return offset.to(torch.int16)


def scale_rounding_snr(tensor: IntScaleTensor, group_scale: Tensor) -> float:
    """What rounding the scales cost: signal to noise of the dequantized weight against its float scales, in dB.

    Args:
        tensor: made by ``IntScaleTensor.from_codes``.
        group_scale: the float scales it was made from, ``[..., N, ceil(K / group_size)]``.

    Returns:
        ``10 log10(sum W^2 / sum (W - dequantized)^2)``; infinite where nothing was lost.

    Raises:
        ConfigError: the tensor has minima, of which the scales say nothing.
    """
    if fmt.is_offset(tensor.zero_point):
        raise ConfigError("scale_rounding_snr: the weight was made with minima: compare it with what it was made from.")
    tensor = tensor.to_packing("plain")
    tensor = tensor.transpose(-2, -1) if tensor.transposed else tensor  # type: ignore[assignment]
    if tensor.dim() == 3:
        powers = [_powers(expert, scale) for expert, scale in zip(tensor.unbind(0), group_scale)]  # type: ignore[arg-type]
    else:
        powers = [_powers(tensor, group_scale)]
    signal, noise = (sum(column) for column in zip(*powers))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def _powers(tensor: IntScaleTensor, group_scale: Tensor, minimum: Optional[Tensor] = None) -> tuple[float, float]:
    """Energy of a plain matrix with float scales (and minima), and of what making them integers changed."""
    if minimum is not None:
        codes, groups = tensor.codes.double(), group_scale.shape[-1]
        scale, low = (
            fmt.expand_group_scale(part.double(), groups * tensor.group_size)[:, : codes.shape[1]]
            for part in (group_scale, minimum)
        )
        wanted = codes * scale + low
        return float(wanted.square().sum()), float((tensor.dequantize(torch.float64) - wanted).square().sum())
    scale = _padded(group_scale.double().abs(), tensor.scale.shape[-1])
    stored = _Codes(
        fmt.pad_codes(tensor.codes, tensor.in_features, tensor.group_size), scale, tensor.zero_point, tensor.in_features
    )
    energy = _energy(stored)
    rounded = tensor.scale.double() * tensor.row_scale.double()
    return float((energy * scale.square()).sum()), float((energy * (rounded - scale).square()).sum())


def _energy(weight: _Codes) -> Tensor:
    """Sum of the squared centered codes of every group, float64 ``[N, G]``."""
    squares = weight.centered().to(torch.int32).square_()
    return squares.unflatten(-1, (weight.scale.shape[-1], -1)).sum(-1).double()


def _padded(part: Tensor, groups: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, groups - part.shape[-1]))


# --- checks -----------------------------------------------------------------------------------------------------------


def check_from_codes(
    group_size: int,
    scale_bits: int,
    amplifier: Union[str, int],
    weight_bits: int,
    zero_point: Optional[Tensor],
    minimum: Optional[Tensor] = None,
) -> None:
    """Raise ``ConfigError`` unless the arguments that say how have supported values."""
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"from_codes: group_size={group_size!r} is not supported: use one of {GROUP_SIZES}.")
    if scale_bits not in range(1, 9):
        raise ConfigError(f"from_codes: scale_bits={scale_bits!r} is not supported: use an integer from 1 to 8.")
    if weight_bits not in (4, 8):
        raise ConfigError(f"from_codes: weight_bits={weight_bits!r} is not supported: use 4 or 8.")
    if weight_bits == 8 and (group_size != -1 or zero_point is not None):
        raise ConfigError("from_codes: 8-bit codes are per channel and symmetric: group_size=-1 and no zero_point.")
    if minimum is not None and (weight_bits == 8 or group_size == -1 or zero_point is not None or amplifier != "row"):
        raise ConfigError(
            'from_codes: minimum goes with 4-bit codes in groups, amplifier="row" and no zero_point, not with '
            f"weight_bits={weight_bits}, group_size={group_size}, amplifier={amplifier!r}"
            f"{'' if zero_point is None else ' and a zero_point'}."
        )
    if minimum is not None and scale_bits < fmt.OFFSET_BITS:
        raise ConfigError(f"from_codes: scale_bits={scale_bits} is too few beside minima: use 4 to 8, best 8.")
    whole = isinstance(amplifier, int) and not isinstance(amplifier, bool) and 1 <= amplifier <= 1 << 20
    if amplifier not in ("row", "layer") and not whole:
        raise ConfigError(
            f'from_codes: amplifier={amplifier!r} is not supported: use "row", "layer" or an integer from 1 to 1048576.'
        )


def check_stack(parts: dict[str, Optional[Tensor]], name: str) -> None:
    """Raise ``WeightError`` unless scales, zero points and minima belong to the stack ``[E, N, K]`` of codes."""
    codes = parts["codes"]
    assert codes is not None
    for part, value in parts.items():
        if value is not None and (value.dim() != 3 or value.shape[0] != codes.shape[0]):
            raise WeightError(f"{name}: {part} has shape {tuple(value.shape)} where codes have {tuple(codes.shape)}.")


def _checked(
    codes: Tensor, group_scale: Tensor, zero_point: Optional[Tensor], group_size: int, weight_bits: int, name: str
) -> _Codes:
    """The operands, checked and padded to whole packing blocks: scale 0 and zero point 0 in padding groups."""
    low, high = (fmt.CODE_MIN, fmt.CODE_MAX) if weight_bits == 4 else (-127, 127)
    if codes.dtype != torch.int8 or codes.dim() != 2 or 0 in codes.shape:
        raise WeightError(f"{name}: codes are {codes.dtype} {tuple(codes.shape)}; int8 [N, K] or [E, N, K] is needed.")
    if int(codes.min()) < low or int(codes.max()) > high:
        raise WeightError(f"{name}: codes lie in [{int(codes.min())}, {int(codes.max())}], not in [{low}, {high}].")
    n, k = codes.shape
    wanted = (n, 1 if group_size == -1 else -(-k // group_size))
    if tuple(group_scale.shape) != wanted or not group_scale.is_floating_point():
        found = f"{group_scale.dtype} {tuple(group_scale.shape)}"
        raise WeightError(f"{name}: group_scale is {found}; {n} x {k} codes in groups of {group_size} need {wanted}.")
    if not bool(torch.isfinite(group_scale).all()):
        raise WeightError(f"{name}: group_scale has NaN or Inf entries: repair the checkpoint.")
    groups = fmt.num_groups(k, group_size)
    if zero_point is not None:
        if tuple(zero_point.shape) != wanted or zero_point.is_floating_point():
            found = f"{zero_point.dtype} {tuple(zero_point.shape)}"
            raise WeightError(f"{name}: zero_point is {found}; integers of shape {wanted} are needed.")
        if int(zero_point.min()) < low or int(zero_point.max()) > high:
            raise WeightError(
                f"{name}: zero_point lies in [{int(zero_point.min())}, {int(zero_point.max())}], not in [-8, 7]: "
                "subtract 8 from zero points of unsigned codes, as from the codes."
            )
        zero_point = _padded(zero_point.to(torch.int8), groups).contiguous()
    return _Codes(
        fmt.pad_codes(codes, k, group_size).contiguous(), _padded(group_scale.double(), groups), zero_point, k
    )


def _checked_minimum(minimum: Tensor, group_scale: Tensor, groups: int, name: str) -> Tensor:
    """Minima float64 ``[N, G]``, 0 in padding groups."""
    if minimum.shape != group_scale.shape or not minimum.is_floating_point():
        found, wanted = f"{minimum.dtype} {tuple(minimum.shape)}", tuple(group_scale.shape)
        raise WeightError(f"{name}: minimum is {found}; floating point of shape {wanted} is needed.")
    if not bool(torch.isfinite(minimum).all()):
        raise WeightError(f"{name}: minimum has NaN or Inf entries: repair the checkpoint.")
    return _padded(minimum.double(), groups)


# --- scales -----------------------------------------------------------------------------------------------------------


def _without_zero_scales(weight: _Codes) -> _Codes:
    """Groups with scale 0 get the code that stands for 0."""
    zero = weight.scale == 0
    if not zero[..., : -(-weight.in_features // _group_width(weight))].any():
        return weight
    at_zero = torch.zeros_like(zero, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    width = weight.codes.shape[-1]  # beside minima a code of 0 stands for the minimum
    mask, values = (fmt.expand_group_scale(part, width) for part in (zero, at_zero))
    mask[..., weight.in_features :] = False
    return weight._replace(codes=torch.where(mask, values, weight.codes))


def _group_width(weight: _Codes) -> int:
    return weight.codes.shape[-1] // weight.scale.shape[-1]


def _positive(weight: _Codes, weight_bits: int, name: str) -> _Codes:
    """Groups with a negative scale, mirrored: the same weights with a positive one."""
    negative = weight.scale < 0
    if not negative.any():
        return weight
    mask = fmt.expand_group_scale(negative, weight.codes.shape[-1])
    mask[..., weight.in_features :] = False
    if weight.zero_point is not None or weight.minimum is not None:
        codes, zero_point, minimum = (
            torch.where(mask, -1 - weight.codes, weight.codes),
            weight.zero_point,
            weight.minimum,
        )
        if zero_point is not None:
            zero_point = torch.where(negative, -1 - zero_point, zero_point)
        if minimum is not None:  # s q + m = -s (-1 - q) + m - s
            minimum = torch.where(negative, minimum - weight.scale, minimum)
        return weight._replace(codes=codes, scale=weight.scale.abs(), zero_point=zero_point, minimum=minimum)
    if weight_bits == 4:
        stuck = (mask & (weight.codes == fmt.CODE_MIN)).any(-1)
        if bool(stuck.any()):
            row = int(stuck.nonzero()[0])
            raise WeightError(
                f"{name}: row {row} has a negative group scale and a code of -8, which has no mirror image: "
                "pass zero_point=torch.zeros_like(group_scale, dtype=torch.int8), which can carry it exactly."
            )
    return weight._replace(codes=torch.where(mask, -weight.codes, weight.codes), scale=weight.scale.abs())


def _row_by_row(weight: _Codes, scale_max: int, name: str) -> tuple[Tensor, Tensor]:
    """Integers int64 ``[N, G]`` and row scales float64 ``[N, 1]``; rows whose proof fails get a smaller range."""
    if weight.scale.shape[-1] == 1:
        scale_max = 1
    integers, row_scale = _fitted(weight, scale_max)
    unsafe = weight.bound(integers, row_scale) > fmt.INT32_MAX
    if unsafe.any():
        if weight.minimum is not None and scale_max < 1 << fmt.OFFSET_BITS:
            raise WeightError(f"{name}: {TOO_FAR}")
        if scale_max == 1:
            raise OverflowProofError(
                f"{name}: rows of {weight.in_features} weights are too long for an int32 accumulator: split the layer."
            )
        integers[unsafe], row_scale[unsafe] = _row_by_row(weight.rows(unsafe), scale_max // 2, name)
    return integers, row_scale


def _fitted(weight: _Codes, scale_max: int) -> tuple[Tensor, Tensor]:
    """The integers and row scales with the least squared error of the weights among the candidates."""
    energy, scale = _energy(weight), weight.scale
    largest = scale.amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    scale = scale / largest  # squares of scales as small as 1e-30 stay normal
    best_error = torch.full_like(largest, math.inf)
    best = torch.ones_like(scale), torch.ones_like(largest)
    for top in range(scale_max, max(0, scale_max - ROW_CANDIDATES), -1):
        integers = (scale * top).round_().clamp_(1, scale_max)
        power = (energy * integers.square()).sum(-1, keepdim=True)
        step = (energy * scale * integers).sum(-1, keepdim=True) / power
        step = torch.where(power > 0, step, torch.full_like(step, 1.0 / top))
        error = (energy * (integers * step - scale).square()).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, integers, best[0]), torch.where(better, step, best[1])
    return best[0].long(), best[1] * largest


def _amplified(weight: _Codes, amplifier: Union[str, int], name: str) -> tuple[Tensor, Tensor]:
    """Integer Scale as published (arXiv 2405.14597): ``round(scale * amplifier)``, at least 1."""
    if isinstance(amplifier, str):
        positive = weight.scale[weight.scale > 0]
        smallest = float(positive.min()) if positive.numel() else 1.0
        amplifier = min(1 << 20, 1 << max(0, math.ceil(-math.log2(smallest))))
    scaled = (weight.scale * amplifier).round()
    if scaled.max() > AMPLIFIER_SCALE_MAX:
        raise OverflowProofError(
            f"{name}: amplifier={amplifier} makes a group scale of {int(scaled.max())}, more than 16 bits: "
            "use a smaller one or 'row'."
        )
    integers = scaled.clamp(min=1).long()
    bound = int(fmt.accumulator_bound(weight.centered(), integers).max())
    if bound > fmt.INT32_MAX:
        raise OverflowProofError(
            f"{name}: the int32 accumulator of a row could reach {bound}, over 2**31 - 1: "
            f"use a smaller amplifier than {amplifier}, or 'row'."
        )
    return integers, weight.scale.new_full((weight.scale.shape[0], 1), 1.0 / amplifier)
