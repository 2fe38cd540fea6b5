"""How a weight takes its activation: gathered in an input order or rotated, then quantized per token or with a static scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Union

import torch
from torch import Tensor

from .. import format as fmt
from ..errors import WeightError

if TYPE_CHECKING:
    from .intscale_tensor import IntScaleTensor

PER_WEIGHT = ("act_pre_scale", "input_order")  # parts of a weight that say so; all rows share them


def with_activation_scale(weight: IntScaleTensor, scale: Union[Tensor, float, None]) -> IntScaleTensor:
    """A weight with a static activation scale: ``xq = clamp(round(x / scale), -127, 127)`` for every token.

    Args:
        scale: positive and finite; one number, or one per expert ``[E, 1, 1]``. None: dynamic, per token.

    Raises:
        WeightError: the scale is not a positive finite number, or has another shape.
    """
    if scale is None:
        return weight.replaced(act_pre_scale=None)
    given = torch.as_tensor(scale, dtype=torch.float32, device=weight.device).detach()
    shape = (*weight.qdata.shape[:-2], 1, 1)
    if given.numel() != 1 and given.shape != shape:
        raise WeightError(f"the activation scale has shape {tuple(given.shape)}: give one number, or {shape}.")
    if not bool((torch.isfinite(given) & (given > 0)).all()):
        raise WeightError("the activation scale is not a positive finite number: calibrate with other inputs.")
    given = given.expand(shape) if given.numel() == 1 else given.clone()
    return weight.replaced(act_pre_scale=fmt.contiguous(given))


def with_rotation(weight: IntScaleTensor, size: int) -> IntScaleTensor:
    """A weight, marked as multiplied by a block Hadamard transform of ``size`` already; its codes do not change.

    Raises:
        WeightError: ``size`` is neither 0 nor a power of two from 2 on that divides the number of input features; or the
            weight has an input order.
    """
    if size and weight.input_order is not None:
        raise WeightError(f"rotation={size!r} of a weight with an input order is not supported: quantize it anew.")
    if not fmt.rotation_fits(size, weight.in_features):
        raise WeightError(
            f"rotation={size!r} does not fit {weight.in_features} input features: use 0, or a power of two that divides them."
        )
    return weight.replaced(rotation=size)


def with_input_order(weight: IntScaleTensor, order: Optional[Tensor]) -> IntScaleTensor:
    """A weight, its stored columns marked as those of the input features ``order``; no code moves.

    Activations are gathered with ``order`` before they are quantized, which changes no token scale.

    Args:
        order: integers ``[K]``, a permutation of ``0 .. K - 1``. None: columns are in the order of the features.

    Raises:
        WeightError: it is no permutation; the weight is rotated, or a stack of experts.
    """
    if order is None:
        return weight.replaced(input_order=None)
    if weight.rotation or weight.dim() != 2:
        what = f"rotation={weight.rotation}" if weight.rotation else "a stack of experts"
        raise WeightError(f"an input order together with {what} is not supported: quantize that weight anew.")
    order = order.detach().to(weight.device).reshape(1, -1)
    if not fmt.is_permutation(order, weight.in_features):
        raise WeightError(f"the input order is no permutation of the {weight.in_features} input features.")
    return weight.replaced(input_order=order.to(torch.int32).contiguous())


def same_part(first: IntScaleTensor, second: IntScaleTensor, name: str) -> bool:
    """Whether two weights have the same values in a part that may be absent."""
    ours, theirs = getattr(first, name), getattr(second, name)
    return ours is theirs or (ours is not None and theirs is not None and torch.equal(ours, theirs))
