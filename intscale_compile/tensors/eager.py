"""The lean path of eager quantized layers on a GPU: from ``F.linear`` to the launches with nothing in between.

Taken where nothing but the result is wanted: no gradient, no mode and no transform that looks at operators, nothing being
compiled. Everything else, and every error, is left to the ordinary path, which gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from ..integrations.torch_state import gpu_index, is_plain, nobody_watches
from ..kernels.from_activation import grouped_from_activation, linear_from_activation
from ..kernels.prepared import MOST_SEQUENCES, prepare_or_none, prepared, store
from ..kernels.quantize_per_token import FLOAT_DTYPES

if TYPE_CHECKING:  # it imports this module
    from .intscale_tensor import IntScaleTensor

_grouped = prepared(grouped_from_activation)
_SLOT = "_eager"  # in the __dict__ of a weight; not stored, not copied


class WeightForm:
    """All about a 2-D weight but the addresses of its parts.

    Attributes:
        parts: ``qdata, scale, per_tensor_scale, zero_point, act_pre_scale``, as looked at.
        layout: shape and strides of each.
        kept: the sequences of launches of all weights of this form.
        device: index of the GPU; -2 where the lean path cannot take the weight.
    """

    __slots__ = ("parts", "layout", "present", "device", "in_features", "out_features", "numbers", "kept")

    def __init__(self, weight: IntScaleTensor):
        self.parts = _parts(weight)
        self.present = tuple(part for part in self.parts if part is not None)
        self.layout = _layout(self.present)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        device = gpu_index(weight.qdata)
        self.numbers = (
            weight.rotation, self.out_features, weight.group_size, weight.scale_bits, weight.packing_format,
        )  # fmt: skip
        usable = (
            device >= 0
            and not weight.transposed
            and weight.qdata.dim() == 2
            and weight.input_order is None
            and all(is_plain(part) and gpu_index(part) == device for part in self.present)
        )
        self.device = device if usable else -2
        forms = tuple(None if p is None else (p.shape, p.stride(), p.dtype) for p in self.parts)
        self.kept = store((linear_from_activation, self.device, forms, self.numbers, self.in_features))

    def __deepcopy__(self, memo: dict) -> None:
        """The copy of a weight finds out for itself."""
        return None

    def holds(self, weight: IntScaleTensor) -> bool:
        """Whether the weight still has this form: the same parts, none of them of another layout since."""
        qdata, scale, row_scale, zero_point, activation_scale = self.parts
        return (
            weight.qdata is qdata
            and weight.scale is scale
            and weight.per_tensor_scale is row_scale
            and weight.zero_point is zero_point
            and weight.act_pre_scale is activation_scale
            and _layout(self.present) == self.layout
        )


def _parts(weight: IntScaleTensor) -> tuple[Optional[Tensor], ...]:
    return weight.qdata, weight.scale, weight.per_tensor_scale, weight.zero_point, weight.act_pre_scale


def _layout(parts: tuple[Tensor, ...]) -> list:
    """``part.data = other`` exchanges what is in a tensor and keeps the tensor."""
    return [(part.shape, part.stride(), part.dtype) for part in parts]


def form_of(weight: IntScaleTensor) -> WeightForm:
    """The form of a weight, kept with it."""
    kept = weight.__dict__.get(_SLOT)
    if kept is None or not kept.holds(weight):
        kept = weight.__dict__[_SLOT] = WeightForm(weight)
    return kept


def _wants_gradient(x: Tensor, bias: Optional[Tensor]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def eager_linear(x: Tensor, weight: IntScaleTensor, bias: Optional[Tensor] = None) -> Optional[Tensor]:
    """``F.linear(x, weight, bias)``, or None where the ordinary path has to run it."""
    device = gpu_index(x)
    if device < 0 or not is_plain(x) or not nobody_watches() or _wants_gradient(x, bias):
        return None
    form = form_of(weight)
    shape, dtype = x.shape, x.dtype
    if device != form.device or dtype not in FLOAT_DTYPES or not shape or shape[-1] != form.in_features:
        return None
    result = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype
    if not x.is_contiguous():
        x = x.contiguous()
    addresses = [x.data_ptr(), *[part.data_ptr() for part in form.present]]
    bias_dtype = None
    if bias is not None:
        if not _is_bias(bias, form):
            return None
        bias_dtype = bias.dtype
        addresses.append(bias.data_ptr())
    everything = 0
    for address in addresses:
        everything |= address
    if everything & 15:
        return None
    key = (shape, dtype, result, bias_dtype)
    found = form.kept.get(key)
    if found is None:
        return _first_call(form, key, (x, *form.parts, bias, *form.numbers, result), addresses)
    return found(addresses)  # type: ignore[return-value]


def _is_bias(bias: Tensor, form: WeightForm) -> bool:
    vector = is_plain(bias) and bias.shape == (form.out_features,) and bias.is_contiguous()
    return vector and gpu_index(bias) == form.device


def _first_call(form: WeightForm, key: Any, arguments: tuple, addresses: list[int]) -> Tensor:
    """The call, and for the next ones a sequence; where there can be none, the launches through Triton."""
    if key not in form.kept:
        if len(form.kept) >= MOST_SEQUENCES:
            form.kept.clear()
        form.kept[key] = prepare_or_none(linear_from_activation, arguments)
    found = form.kept[key]
    return linear_from_activation(*arguments) if found is None else found(addresses)  # type: ignore[return-value]


def eager_grouped(
    x: Tensor, weight: IntScaleTensor, activation_scale: Optional[Tensor], offsets: Tensor, bias: Optional[Tensor],
    row_index: Optional[Tensor], out_index: Optional[Tensor],
) -> Optional[Tensor]:  # fmt: skip
    """The grouped linear of checked operands, or None where the ordinary path has to run it."""
    if gpu_index(x) < 0 or not is_plain(x) or not nobody_watches() or _wants_gradient(x, bias):
        return None
    operands = (*_parts(weight)[:4], activation_scale, bias, offsets, row_index, out_index)
    if not all(t is None or (is_plain(t) and t.device == x.device) for t in operands):
        return None
    # The kernel reads int32; a conversion is no launch of ours, so it comes first.
    offsets, row_index, out_index = (None if t is None else t.to(torch.int32) for t in operands[-3:])  # type: ignore[assignment]
    return _grouped(
        x, *operands[:-3], offsets, row_index, out_index, weight.rotation, weight.out_features, weight.group_size,
        weight.scale_bits, weight.packing_format, x.dtype,
    )  # fmt: skip
