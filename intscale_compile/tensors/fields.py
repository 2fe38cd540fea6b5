"""The parts of an ``IntScaleTensor``, declared once: names, order of the constructor, and what absent ones mean."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..config import say_communication_moved

SCALE_DTYPES = (torch.uint8, torch.int16)
QDATA_DTYPES = (torch.uint8, torch.int8)


class TensorParts(NamedTuple):
    """Everything that an ``IntScaleTensor`` is made of; :class:`~intscale_compile.IntScaleTensor` says what each part is."""

    qdata: Tensor
    scale: Tensor
    per_tensor_scale: Tensor
    block_size: list
    in_features: int
    out_features: int
    scale_bits: int
    packing_format: str
    transposed: bool
    dtype: torch.dtype
    zero_point: Optional[Tensor] = None
    act_pre_scale: Optional[Tensor] = None
    input_order: Optional[Tensor] = None
    rotation: int = 0


_DATA = ("Tensor", "Optional[Tensor]")  # annotations are text here
_is_data = {
    name: str(getattr(kind, "__forward_arg__", kind)) in _DATA for name, kind in TensorParts.__annotations__.items()
}

OF_0_1_0 = ("communication",)  # attributes that files of version 0.1.0 have, which mean nothing now
ABSENT = TensorParts._field_defaults  # what absent parts mean
ALL_NAMES = TensorParts._fields  # in the order of the constructor
DATA_NAMES = tuple(name for name in ALL_NAMES if _is_data[name])
ATTRIBUTE_NAMES = tuple(name for name in ALL_NAMES if not _is_data[name])


def drop_old_parts(parts: dict) -> None:
    """Take out of stored parts what only files of version 0.1.0 have; said once where it asked for something."""
    if any(parts.pop(name, None) is not None for name in OF_0_1_0):
        say_communication_moved()
