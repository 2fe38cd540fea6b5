"""Tensors made from weights or from codes: one matrix, or a stack of experts one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

from .. import format as fmt
from ..config import IntScaleConfig
from .from_codes import check_stack, integer_weight
from .scale_search import quantize_weight

if TYPE_CHECKING:
    from .intscale_tensor import IntScaleTensor


def quantized(cls: type[IntScaleTensor], weight: Tensor, config: IntScaleConfig, name: str) -> IntScaleTensor:
    """``IntScaleTensor.from_hp`` of a checked weight ``[N, K]`` or ``[E, N, K]``."""
    if weight.dim() == 3:  # one by one: temporaries of a whole stack would not fit beside it
        experts = (quantized(cls, expert, config, f"{name}[{e}]") for e, expert in enumerate(weight))
        return _stacked(experts, weight.shape[0])
    made = quantize_weight(weight, config)
    group_size, bits = config.effective_group_size, config.weight_bits
    tensor = cls(
        made.codes if bits == 8 else fmt.pack_int4(made.codes, group_size),
        made.group_scale,
        made.row_scale,
        [1, group_size],
        weight.shape[-1],
        weight.shape[-2],
        made.scale_bits,
        "plain",
        False,
        weight.dtype,
    )
    return tensor.to_packing(_packing(config.packing_format, weight.device))


class CodeParts(NamedTuple):
    """What ``IntScaleTensor.from_codes`` is given of one weight, or of a stack."""

    codes: Tensor
    group_scale: Tensor
    zero_point: Optional[Tensor]
    minimum: Optional[Tensor]


def coded(
    cls: type[IntScaleTensor],
    parts: CodeParts,
    how: dict[str, Any],
    dtype: torch.dtype,
    packing_format: str,
    name: str,
) -> IntScaleTensor:
    """``IntScaleTensor.from_codes`` with checked options ``how``: group_size, scale_bits, amplifier, weight_bits."""
    codes = parts.codes
    if codes.dim() == 3:
        check_stack(parts._asdict(), name)
        matrices = (CodeParts(*(None if part is None else part[e] for part in parts)) for e in range(len(codes)))  # type: ignore[arg-type]
        experts = (coded(cls, one, how, dtype, packing_format, f"{name}[{e}]") for e, one in enumerate(matrices))
        return _stacked(experts, codes.shape[0])
    made = integer_weight(codes, parts.group_scale, parts.zero_point, name=name, minimum=parts.minimum, **how)
    tensor = cls(
        made.codes if how["weight_bits"] == 8 else fmt.pack_int4(made.codes, how["group_size"]),
        made.group_scale,
        made.row_scale,
        [1, how["group_size"]],
        codes.shape[-1],
        codes.shape[0],
        made.scale_bits,
        "plain",
        False,
        dtype,
        made.zero_point,
    )
    return tensor.to_packing(_packing(packing_format, codes.device))


def _stacked(experts: Iterator[IntScaleTensor], count: int) -> IntScaleTensor:
    """A stack of ``count`` matrices, each of them freed once it is copied."""
    data: dict[str, Tensor] = {}
    scale_bits = 1
    for e, expert in enumerate(experts):
        for name in expert.data_names:
            part = getattr(expert, name)
            data.setdefault(name, part.new_empty((count, *part.shape)))[e] = part
        scale_bits = max(scale_bits, expert.scale_bits)
    return expert.replaced(**data, block_size=[1, *expert.block_size], scale_bits=scale_bits)


def _packing(packing_format: str, device: torch.device) -> str:
    """``"auto"`` becomes tiled on a GPU and plain elsewhere."""
    return ("tiled" if device.type == "cuda" else "plain") if packing_format == "auto" else packing_format
