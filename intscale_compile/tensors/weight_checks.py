"""Whether a high-precision weight can be quantized at all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WeightError


def check_weight(weight: Tensor, name: str) -> None:
    """Raise ``WeightError`` unless ``weight`` can be quantized."""
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise WeightError(f"{name} is {weight.dtype}; only floating point weights of 16 bits or more can be quantized.")
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise WeightError(f"{name} has shape {tuple(weight.shape)}; a non-empty [N, K] or [E, N, K] weight is needed.")
    if weight.device.type == "meta":
        raise WeightError(f"{name} is on the meta device and has no data: load the checkpoint (or to_empty) first.")
    if not _is_finite(weight):
        raise WeightError(
            f"{name} has NaN or Inf entries: repair the checkpoint, or leave this layer out with filter_fn."
        )


def _is_finite(weight: Tensor) -> bool:
    # The least and the greatest entry are NaN where any entry is; nothing of the size of the weight is allocated for them.
    # float64 is quantized in float32, where 1e300 is Inf.
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight)).float()).all())
