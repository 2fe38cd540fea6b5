"""Models that torchao quantized to 4 bits: their weights become ``IntScaleTensor``, codes unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from ..errors import ConfigError
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import mark_loaded
from .layers import (
    ORIGINAL,
    QuantizedLayer,
    ScaleOptions,
    check_group_size,
    check_part,
    groups_of,
    require,
    to_intscale,
)
from .report import ImportReport

ZERO_TOLERANCE = 2.0**-6  # of a code: zero points that are stored in bf16 miss an integer by up to 2**-6


def convert_from_torchao(model: nn.Module, *, scale_bits: int = 8, amplifier: Union[str, int] = "row") -> ImportReport:
    """Convert a loaded model's torchao int4 weights in place.

    ``Int4Tensor`` and ``IntxUnpackedToInt8Tensor`` of 4 bits (``IntxWeightOnlyConfig``,
    ``Int8DynamicActivationIntxWeightConfig``) are read. A failed call leaves the model as it was.

    Args:
        model: with linear layers that ``quantize_`` of torchao converted.
        scale_bits: bits of the integer group scales, 1 to 8.
        amplifier: ``"row"``, ``"layer"`` or an integer.

    Returns:
        A report that prints itself.

    Raises:
        ConfigError: no weight is a torchao tensor, or one is in a packing or with zero points that cannot be taken over.
        OverflowProofError: a weight's accumulator cannot be proved free of overflow.
    """
    options, report = ScaleOptions(scale_bits, amplifier), ImportReport()
    found: list[tuple[nn.Linear, IntScaleTensor]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module.weight, IntScaleTensor):
            continue
        weight: Any = module.weight
        if not isinstance(weight, TorchAOBaseTensor):
            report.unquantized.append(name)
            continue
        tensor, row = to_intscale(_layer_of(weight, name), name, weight.dtype, options)
        found.append((module, tensor))
        report.layers.append(row)
    if not found:
        raise ConfigError("convert_from_torchao: no linear layer of the model has a weight that torchao quantized.")
    for module, tensor in found:
        module.weight = nn.Parameter(tensor, requires_grad=False)
    mark_loaded(model)
    return report


def _layer_of(weight: Any, name: str) -> QuantizedLayer:
    kind = type(weight).__name__
    if kind not in READERS:
        raise ConfigError(
            f"{name}: torchao's {kind} cannot be imported: {', '.join(READERS)} can, whose codes are stored in plain order. "
            "Quantize with one of those, or with IntScaleConfig."
        )
    if getattr(weight, "act_pre_scale", None) is not None:
        raise ConfigError(f"{name}: act_pre_scale multiplies the activation, which cannot be imported: fold it first.")
    if weight.dim() != 2 or any(size != 1 for size in weight.block_size[:-1]):
        raise ConfigError(
            f"{name}: shape {tuple(weight.shape)}, block size {tuple(weight.block_size)} cannot be imported: {ORIGINAL}"
        )
    return READERS[kind](weight, name)


def _group_size(weight: Any, name: str) -> int:
    block, features = int(weight.block_size[-1]), weight.shape[-1]
    return -1 if block == features else check_group_size(name, block)


def _int4_tensor(weight: Any, name: str) -> QuantizedLayer:
    """``W = scale * q + zero_point`` with two's complement codes, even features in the low bits; scales ``[G, N]``."""
    group_size = _group_size(weight, name)
    out_features, in_features = weight.shape
    groups = groups_of(in_features, group_size)
    check_part(name, "scale", weight.scale, None, (groups, out_features))
    check_part(name, "zero_point", weight.zero_point, None, (groups, out_features))
    require(
        tuple(weight.qdata.shape) == (out_features, in_features // 2), name, f"qdata is {tuple(weight.qdata.shape)}"
    )
    packed = weight.qdata.view(torch.uint8)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    codes = torch.where(nibbles >= 8, nibbles - 16, nibbles)
    scale = weight.scale.float().t().contiguous()
    zero_point = _whole_zero_points(-weight.zero_point.float().t(), scale, name)
    return QuantizedLayer("torchao Int4Tensor", codes, scale, zero_point, group_size)


def _intx_tensor(weight: Any, name: str) -> QuantizedLayer:
    """``W = scale * (q - zero_point)`` with one code a byte; scales ``[N, G]``."""
    if weight.target_dtype != torch.int4:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{name}: torchao weights of {weight.target_dtype} cannot be imported, torch.int4 can: {ORIGINAL}"
        )
    group_size = _group_size(weight, name)
    scale, zero_point = weight.scale.float(), weight.zero_point
    if zero_point.is_floating_point():
        zero_point = _whole_zero_points(zero_point.float() * scale, scale, name)
    return QuantizedLayer("torchao IntxUnpackedToInt8Tensor", weight.qdata, scale, zero_point, group_size)


def _whole_zero_points(offset: Tensor, scale: Tensor, name: str) -> Tensor:
    """Integer zero points int8 ``[N, G]`` of offsets ``zero_point * scale``.

    Raises:
        ConfigError: they are fractions of a code, or out of range; taking the nearest would move the weights.
    """
    exact = torch.where(scale == 0, torch.zeros_like(offset), offset / scale)
    whole = exact.round()
    worst = float((exact - whole).abs().max())
    if worst > ZERO_TOLERANCE or not bool(((whole >= -8) & (whole <= 7)).all()):
        raise ConfigError(
            f"{name}: its zero points are fractions of a code (up to {worst:.2f} from an integer) or out of [-8, 7]; taking "
            "the nearest integers would move every weight. Quantize symmetrically, with integer zero points "
            "(IntxWeightOnlyConfig, AWQ, GPTQ), or with IntScaleConfig."
        )
    return whole.to(torch.int8)


READERS: dict[str, Callable[[Any, str], QuantizedLayer]] = {
    "Int4Tensor": _int4_tensor,
    "IntxUnpackedToInt8Tensor": _intx_tensor,
}
