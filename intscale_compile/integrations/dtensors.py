"""DTensors seen from outside: what they are and the tensor of this rank within them, without importing them."""

from __future__ import annotations

import sys
from typing import Any


def dtensor_class() -> Any:
    """``torch.distributed.tensor.DTensor``, or None where nothing has imported it: then there is no DTensor either."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a tensor that is placed on a mesh of ranks."""
    kind = dtensor_class()
    return kind is not None and isinstance(value, kind)


def local_tensor(value: Any) -> Any:
    """The tensor of this rank inside of a DTensor; anything else as it is."""
    return value._local_tensor if is_dtensor(value) else value
