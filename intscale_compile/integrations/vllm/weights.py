"""Weights of one layer of vLLM: rows that its loaders bring one after another, what they become, and their products.

Nothing here imports vLLM. A layer keeps the parts of its weights as plain parameters, which its torch.compile, its CUDA graphs
and its device moves know; :class:`WeightForm` says what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ShardingError, UnsupportedOpError
from ...format import k_alignment
from ...kernels.arguments import GroupedArguments, LinearArguments
from ...kernels.w4a8_grouped import GROUPED_OP
from ...kernels.w4a8_linear import LINEAR_OP
from ...ops import KERNEL_ABI, register_inductor
from ...tensors.experts import scale_of_positions
from ...tensors.intscale_tensor import IntScaleTensor
from ...tensors.linear import quantize_activation


class Rows(NamedTuple):
    """Output rows of a layer that were loaded: where they begin, and their weights ``[N, K]``, quantized or plain."""

    start: int
    weight: Tensor


@dataclass(frozen=True)
class WeightForm:
    """One weight of a layer, or several rows of it that read the activation alike.

    Attributes:
        prefix: of the names of the parameters that hold its parts.
        parts: the parts of an ``IntScaleTensor`` that it has; empty: it is a plain weight.
        out_features, group_size, scale_bits, packing, rotation: as of ``IntScaleTensor``.
    """

    prefix: str
    parts: tuple[str, ...]
    out_features: int
    group_size: int = 0
    scale_bits: int = 0
    packing: str = "plain"
    rotation: int = 0

    def part(self, layer: nn.Module, name: str) -> Optional[Tensor]:
        """A part of the weight; None where it has none."""
        return getattr(layer, f"{self.prefix}{name}") if name in self.parts else None

    def codes(self, layer: nn.Module) -> Tensor:
        """The largest part: packed codes, or the plain weight."""
        return getattr(layer, f"{self.prefix}{'qdata' if self.parts else 'weight'}")


def cut(weight: Tensor, dim: int, start: int, size: int, name: str, ranks: int) -> Tensor:
    """The part of a weight ``[N, K]`` that a rank holds.

    Args:
        weight: quantized or plain.
        dim: 0: output rows; 1: input features.
        start, size: of the part.
        name: of the layer, for errors.
        ranks: into how many parts vLLM divides the layer.

    Raises:
        ShardingError: the cut would go through a group, or the weight has an input order.
        CheckpointError: the weight has no such rows or features.
    """
    if start + size > weight.shape[dim]:
        what = "input features" if dim else "output rows"
        raise CheckpointError(
            f"{name}: the checkpoint has {weight.shape[dim]} {what} where vLLM reads {start} to {start + size}: it is damaged, "
            "or its config.json is another model's."
        )
    if (start, size) == (0, weight.shape[dim]):
        return weight
    try:
        return weight.narrow(dim, start, size)
    except UnsupportedOpError:
        # Its mend, to dequantize, is none for who starts a server: only ours is shown.
        raise _cut_through(weight, size, name, ranks) from None


def _cut_through(weight: Tensor, size: int, name: str, ranks: int) -> ShardingError:
    """What to say of a weight whose input features cannot be cut so."""
    group, rotation = weight.group_size, weight.rotation  # type: ignore[attr-defined]
    asked = f"{name}: tensor parallelism over {ranks} ranks cuts its {weight.shape[1]} input features into {size}"
    fewer = "use a smaller --tensor-parallel-size"
    if weight.input_order is not None:  # type: ignore[attr-defined]
        return ShardingError(
            f"{asked}, and its groups are scattered (an input order): {fewer}, or a checkpoint without desc_act."
        )
    if size % k_alignment(group):
        return ShardingError(
            f"{asked}, no multiple of {k_alignment(group)}, as groups of {group} need: {fewer}, or quantize "
            "with a smaller group_size."
        )
    return ShardingError(f"{asked}, through blocks of its rotation={rotation}: {fewer}, or quantize without rotation.")


def joined(rows: Sequence[Rows], out_features: int, name: str) -> list[Tensor]:
    """The weights of a layer in order of their rows, neighbours joined where one product can serve them.

    Raises:
        CheckpointError: rows are missing, or were loaded twice.
    """
    end, weights = 0, []  # type: ignore[var-annotated]
    for start, weight in sorted(rows, key=lambda r: r.start):
        if start != end:
            break
        end += weight.shape[0]
        both = _join(weights[-1], weight) if weights else None
        weights[-1:] = [both] if both is not None else [*weights[-1:], weight]
    if end != out_features or sum(row.weight.shape[0] for row in rows) != out_features:
        have = sorted((r.start, r.start + r.weight.shape[0]) for r in rows)
        raise CheckpointError(
            f"{name}: {out_features} output rows are needed, loaded were {have or 'none'}: the checkpoint is incomplete, or was "
            "not read by vLLM's default loader (leave --load-format out)."
        )
    return weights


def _join(first: Tensor, second: Tensor) -> Optional[Tensor]:
    quantized = [isinstance(weight, IntScaleTensor) for weight in (first, second)]
    if any(quantized) and not all(quantized):
        return None
    try:
        return torch.cat([first, second])
    except UnsupportedOpError:  # they read the activation differently, or are stored differently
        return None


def hold(
    layer: nn.Module, weights: Sequence[Tensor], device: torch.device, prefix: str = "intscale"
) -> tuple[WeightForm, ...]:
    """Register the parts of weights as parameters of a layer, packed for the device; returns their forms.

    Inductor is taught our operators here, in the process that has the weights: vLLM's workers get the configuration pickled,
    and what Dynamo traces cannot import.

    Args:
        layer: of vLLM.
        weights: ``[N, K]`` or stacks ``[E, N, K]``, quantized, or plain matrices.
        device: where they go.
        prefix: of the parameters' names.
    """
    register_inductor()
    forms = []
    for number, weight in enumerate(weights):
        start = f"{prefix}{number}_"
        if not isinstance(weight, IntScaleTensor):
            _register(layer, f"{start}weight", weight, device)
            forms.append(WeightForm(start, (), weight.shape[0]))
            continue
        packed = weight.to(device).to_packing("tiled" if device.type == "cuda" else "plain")  # type: ignore[attr-defined]
        for part in packed.data_names:
            _register(layer, f"{start}{part}", getattr(packed, part), device)
        forms.append(
            WeightForm(
                start, tuple(packed.data_names), packed.out_features, packed.group_size, packed.scale_bits,
                packed.packing_format, packed.rotation,
            )
        )  # fmt: skip
    return tuple(forms)


def _register(layer: nn.Module, name: str, tensor: Tensor, device: torch.device) -> None:
    own = tensor.detach().to(device).contiguous()
    if own.untyped_storage().nbytes() != own.nbytes:  # a slice would keep the whole weight
        own = own.clone()
    layer.register_parameter(name, nn.Parameter(own, requires_grad=False))


def product(layer: nn.Module, forms: Sequence[WeightForm], x: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``x @ W.T + bias`` for the weights of a layer, one after another.

    Args:
        layer: that holds them.
        forms: of :func:`hold`.
        x: fp32, bf16 or fp16 ``[..., K]``.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    results, start, quantized = [], 0, None
    for form in forms:
        part = None if bias is None else bias[start : start + form.out_features]
        start += form.out_features
        if not form.parts:
            results.append(nn.functional.linear(x, getattr(layer, f"{form.prefix}weight"), part))
            continue
        static, order = form.part(layer, "act_pre_scale"), form.part(layer, "input_order")
        if quantized is None or static is not None or order is not None or form.rotation != forms[0].rotation:
            quantized = quantize_activation(x, form.rotation, static, order)[:2]
        results.append(_linear(layer, form, *quantized, part, x.dtype))
        if static is not None or order is not None or form.rotation != forms[0].rotation:
            quantized = None
    return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def _linear(
    layer: nn.Module, form: WeightForm, xq: Tensor, token_scale: Tensor, bias: Optional[Tensor], dtype: torch.dtype
) -> Tensor:
    return LINEAR_OP(
        *LinearArguments(
            xq=xq,
            token_scale=token_scale,
            qdata=getattr(layer, f"{form.prefix}qdata"),
            scale=getattr(layer, f"{form.prefix}scale"),
            row_scale=getattr(layer, f"{form.prefix}per_tensor_scale"),
            bias=bias,
            out_features=form.out_features,
            group_size=form.group_size,
            scale_bits=form.scale_bits,
            packing=form.packing,
            dtype=dtype,
            abi=KERNEL_ABI,
            zero_point=form.part(layer, "zero_point"),
        )
    )


def grouped_product(
    layer: nn.Module, form: WeightForm, x: Tensor, offsets: Tensor, row_index: Optional[Tensor] = None,
    out_index: Optional[Tensor] = None,
) -> Tensor:  # fmt: skip
    """``tensors.experts.grouped_linear`` of a stack that a layer holds; arguments and result as there."""
    static = form.part(layer, "act_pre_scale")
    if static is not None:
        x, row_index = (x, None) if row_index is None else (x[row_index], None)
        static = scale_of_positions(static, offsets, x.shape[0])
    xq, token_scale, _ = quantize_activation(x, form.rotation, static)
    return GROUPED_OP(
        *GroupedArguments(
            xq=xq,
            token_scale=token_scale,
            qdata=getattr(layer, f"{form.prefix}qdata"),
            scale=getattr(layer, f"{form.prefix}scale"),
            row_scale=getattr(layer, f"{form.prefix}per_tensor_scale"),
            bias=None,
            offsets=offsets,
            out_features=form.out_features,
            group_size=form.group_size,
            scale_bits=form.scale_bits,
            packing=form.packing,
            dtype=x.dtype,
            abi=KERNEL_ABI,
            row_index=row_index,
            out_index=out_index,
            zero_point=form.part(layer, "zero_point"),
        )
    )
