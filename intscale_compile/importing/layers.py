"""One layer of a quantized checkpoint, whatever its format: codes, float group scales, zero points.

    W[n, k] = scale[n, k // group_size] * (codes[n, k] - zero_point[n, k // group_size])

Every reader of a format ends here, and here the scales become integers (Integer Scale, arXiv 2405.14597; row by row with
8 bits unless told otherwise) while the codes stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional, Protocol, Union

import torch
from torch import Tensor

from .. import format as fmt
from ..config import GROUP_SIZES
from ..errors import CheckpointError, ConfigError
from ..tensors.from_codes import _powers as rounding_powers
from ..tensors.intscale_tensor import IntScaleTensor
from .report import ConvertedLayer

BLOCK_ELEMENTS = 1 << 20
ORIGINAL = "quantize the original model with IntScaleConfig, or use this one without intscale."


@dataclass(frozen=True)
class QuantizedLayer:
    """A weight as a checkpoint holds it.

    Args:
        format: name of the format, for the report.
        codes: int8 ``[N, K]``, in [-8, 7] for 4 bits.
        scale: fp32 ``[N, G]`` with ``G = ceil(K / group_size)``, or 1 per channel; negative and zero ones may occur.
        zero_point: int8 ``[N, G]`` in [-8, 7], or None.
        group_size: as the format has it; -1 per channel.
        weight_bits: 4 or 8.
        activation_scale: static scale of the activation; None: dynamic, per token.
        input_order: input feature of every column of ``codes``, integers ``[K]``; None: columns are in the features' order.
        note: what the user should know of how it was read; empty: nothing.
        minimum: fp32 ``[N, G]``, added to ``scale * codes``, for groups of ours without zero points; None: 0.
    """

    format: str
    codes: Tensor
    scale: Tensor
    zero_point: Optional[Tensor]
    group_size: int
    weight_bits: int = 4
    activation_scale: Optional[float] = None
    input_order: Optional[Tensor] = None
    note: str = ""
    minimum: Optional[Tensor] = None


class LayerFormat(Protocol):
    """What a reader of one checkpoint format offers."""

    required: tuple[str, ...]
    """Last parts of the names of the tensors that every quantized layer must have."""
    optional: tuple[str, ...]
    """Last parts of names that belong to the format and may be missing."""

    def read(self, name: str, parts: Mapping[str, Tensor]) -> QuantizedLayer:
        """Unpack the tensors of the layer ``name``, by the last part of their names."""
        ...


@dataclass(frozen=True)
class ScaleOptions:
    """How float scales become integers: the arguments of ``IntScaleTensor.from_codes``."""

    scale_bits: int = 8
    amplifier: Union[str, int] = "row"


def require(ok: bool, name: str, what: str) -> None:
    """Raise ``CheckpointError`` that names the layer unless ``ok``."""
    if not ok:
        raise CheckpointError(f"{name}: {what}; the checkpoint is damaged, or its quantization_config is not its own.")


def require_symmetric(name: str, part: str, zero_point: Tensor, what: str) -> None:
    """Raise ``CheckpointError`` where stored zero points int8, on the scale of signed codes, are not those of ``what``."""
    if bool(zero_point.any()):
        least, most = int(zero_point.min()) + 8, int(zero_point.max()) + 8
        raise CheckpointError(
            f"{name}: its {part} holds zero points from {least} to {most} where {what} in quantization_config means 8 for all "
            "groups; one of them is wrong: correct quantization_config, or get the checkpoint again."
        )


def check_part(name: str, part: str, tensor: Tensor, dtype: Optional[torch.dtype], shape: tuple[int, ...]) -> None:
    """Raise ``CheckpointError`` unless a stored tensor has this shape and dtype (None: any floating point)."""
    ok = tensor.dtype.is_floating_point if dtype is None else tensor.dtype == dtype
    require(ok, name, f"{part} is {tensor.dtype}, not {'floating point' if dtype is None else dtype}")
    found = tuple(tensor.shape)
    require(found == shape, name, f"{part} has shape {found} where the other tensors of the layer need {shape}")


def nibbles(packed: Tensor) -> Tensor:
    """Unpack int32 words ``[R, C]`` into their 4-bit fields uint8 ``[R, 8 C]``, the lowest bits first."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def groups_of(in_features: int, group_size: int) -> int:
    """Number of groups of a row; the last one may be shorter."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def check_group_size(name: str, group_size: Any) -> int:
    """The group size of a format, if our groups can be made of it: a multiple of 32, or -1.

    Raises:
        ConfigError: it is something else.
    """
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not whole or not (group_size == -1 or (group_size > 0 and group_size % 32 == 0)):
        raise ConfigError(
            f"{name}: group size {group_size!r} cannot be imported: multiples of 32, or -1, can; quantize the model anew."
        )
    return group_size


def order_of_groups(name: str, part: str, group: Tensor, group_size: int) -> Optional[Tensor]:
    """Input features sorted by their group, those of one group in their own order; None where they are so already.

    Args:
        name, part: of the layer and the tensor, for the error.
        group: of every input feature, integers ``[K]``.
        group_size: of the format; -1 per channel.

    Returns:
        int64 ``[K]``, or None.

    Raises:
        CheckpointError: the groups do not have ``group_size`` features each (the last one what is left).
    """
    features = torch.arange(group.numel(), device=group.device)
    wanted = features // group_size if group_size != -1 else torch.zeros_like(features)
    ordered, order = group.long().sort(stable=True)
    if not torch.equal(ordered, wanted):
        what = f"groups of {group_size} features each" if group_size != -1 else "one group"
        raise CheckpointError(
            f"{name}: {part} does not divide the {group.numel()} input features into {what}: the checkpoint is damaged, or "
            "group_size in its quantization_config is another; correct it, or quantize the model with desc_act=False."
        )
    return None if torch.equal(order, features) else order


def to_intscale(
    layer: QuantizedLayer, name: str, dtype: torch.dtype, options: ScaleOptions
) -> tuple[IntScaleTensor, ConvertedLayer]:
    """The layer as an ``IntScaleTensor``, its codes unchanged, and what that cost.

    Raises:
        CheckpointError: a scale is not finite.
        WeightError: codes are out of range.
        OverflowProofError: an accumulator cannot be proved free of overflow with these codes.
    """
    require(bool(torch.isfinite(layer.scale).all()), name, "a scale is NaN or Inf")
    stored = _with_our_groups(_with_needed_zero_points(layer))
    parts, signal, noise, bound = [], 0.0, 0.0, 0
    for rows in _row_blocks(stored, options):
        scale, low = stored.scale[rows], None if stored.minimum is None else stored.minimum[rows]
        part = IntScaleTensor.from_codes(
            stored.codes[rows],
            scale,
            group_size=stored.group_size,
            zero_point=None if stored.zero_point is None else stored.zero_point[rows],
            scale_bits=options.scale_bits,
            amplifier=options.amplifier,
            weight_bits=stored.weight_bits,
            dtype=dtype,
            name=name,
            minimum=low,
        )
        powers = rounding_powers(part.to_packing("plain"), scale, low)
        signal, noise = signal + powers[0], noise + powers[1]
        bound = max(bound, int(part.accumulator_bound().max()))
        parts.append(part)
    tensor: Any = parts[0] if len(parts) == 1 else torch.cat(parts)  # type: ignore[arg-type]
    if layer.activation_scale is not None:
        tensor = tensor.with_activation_scale(layer.activation_scale)
    if layer.input_order is not None:
        tensor = tensor.with_input_order(layer.input_order)
    report = ConvertedLayer(
        name,
        layer.format,
        (layer.codes.shape[0], layer.codes.shape[1]),
        layer.group_size,
        stored.zero_point is None and stored.minimum is None,
        decibels(signal, noise),
        headroom_bits(bound),
    )
    return tensor, report


def _row_blocks(layer: QuantizedLayer, options: ScaleOptions) -> list[slice]:
    """Rows that are converted at a time: temporaries stay small, and in the cache. ``"layer"`` looks at all rows at once."""
    count, columns = layer.codes.shape
    whole = layer.codes.is_cuda or options.amplifier == "layer"
    step = count if whole else fmt.TILE_N * max(1, BLOCK_ELEMENTS // (columns * fmt.TILE_N))
    return [slice(first, first + step) for first in range(0, count, step)]


def decibels(signal: float, noise: float) -> float:
    """Signal to noise in dB; infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def headroom_bits(bound: int) -> float:
    """Bits between the largest value that an accumulator can reach, and 2**31."""
    return math.log2((fmt.INT32_MAX + 1) / max(1, bound))


def _with_needed_zero_points(layer: QuantizedLayer) -> QuantizedLayer:
    """No zero points where all are 0; but some where a group has a negative scale and a code without a mirror image."""
    if layer.zero_point is not None and not bool(layer.zero_point.any()):
        layer = replace(layer, zero_point=None)
    stuck = (
        layer.weight_bits == 4
        and layer.minimum is None
        and bool((layer.scale < 0).any())
        and int(layer.codes.min()) == fmt.CODE_MIN
    )
    if stuck and layer.zero_point is None:
        layer = replace(layer, zero_point=torch.zeros_like(layer.scale, dtype=torch.int8))
    return layer


def _with_our_groups(layer: QuantizedLayer) -> QuantizedLayer:
    """Cut groups that we do not have, such as 512, into the largest of ours that divides them: they share their scale."""
    if layer.group_size in GROUP_SIZES:
        return layer
    if layer.scale.shape[1] == 1:  # one group as long as the row, or longer
        return replace(layer, group_size=-1)
    size = next(size for size in (256, 128, 64, 32) if layer.group_size % size == 0)
    parts, groups = layer.group_size // size, groups_of(layer.codes.shape[1], size)
    scale = layer.scale.repeat_interleave(parts, dim=1)[:, :groups]
    zero_point = layer.zero_point
    if zero_point is not None:
        zero_point = zero_point.repeat_interleave(parts, dim=1)[:, :groups]
    return replace(layer, scale=scale, zero_point=zero_point, group_size=size)
