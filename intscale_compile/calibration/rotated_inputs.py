"""Rotation of the input of every linear layer by itself, for models whose residual stream cannot be rotated: encoders.

    x W^T = (x H) (W H)^T

``H`` is a block Hadamard matrix. The layer transforms its input when the model runs, before that becomes int8 (QuaRot's online
transform, arXiv 2404.00456, before every layer instead of the down projections alone); the weight's columns absorb it. So
int8 per token loses little to channels that stand out, whatever norms and residual sums lie between. Nothing else of the model
changes, and the layers that read one tensor still read one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from ..kernels.hadamard import hadamard_transform
from ..tensors.input_rotation import start_rotating
from .groups import difference
from .layers import blocks, record_inputs, run_block, weights_of
from .rotation import SMALLEST_BLOCK, tolerance_of


def rotate_inputs(model: nn.Module, batch: Mapping[str, Any], left_alone: set[tuple[int, str]]) -> dict[str, int]:
    """Let the linear layers of a model's blocks transform their inputs, in place, the model's function kept.

    Args:
        model: as for ``calibrate``.
        batch: of model inputs, to check each block with.
        left_alone: weights that are not quantized, by the id of their module and their name; they stay as they are. So do
            stacks of experts, and layers whose number of input features no power of two from 16 on divides.

    Returns:
        Size of the Hadamard blocks by name of the layer, as ``rotate`` returns it. A hook transforms the input of a layer
        until it is quantized.

    Raises:
        CalibrationError: a block's output changed; the model is then half done.
    """
    sizes: dict[str, int] = {}
    moved = {k: v.to(next(model.parameters()).device) if hasattr(v, "to") else v for k, v in batch.items()}
    recorded = record_inputs(model, moved)
    with torch.no_grad():
        for name, block in blocks(model):
            before = run_block(block, recorded[name])
            for weight in weights_of(block).values():
                size = weight.weight.shape[-1] & -weight.weight.shape[-1]
                out = weight.router or weight.weight.dim() == 3 or (id(weight.module), weight.parameter) in left_alone
                if out or size < SMALLEST_BLOCK:
                    continue
                turned = hadamard_transform(weight.weight.float().contiguous(), size)
                weight.weight.copy_(turned.to(weight.weight.dtype))
                start_rotating(weight.module, size)
                sizes[f"{name}.{weight.name}"] = size
            if not difference(run_block(block, recorded[name]), before) < tolerance_of(model):
                raise CalibrationError(
                    f"{name} ({type(block).__name__}) reads a weight without calling its layer, so that inputs cannot be "
                    "rotated: use rotation='none'."
                )
    return sizes
