"""Reports of single layers: those that a graph holds, and those that none does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor, nn

from .. import format as fmt
from ..integrations.torch import local_tensor
from ..passes import Candidate
from ..reasons import Reason
from ..tensors.expert_layers import expert_stacks
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import is_conv1d
from .records import LayerReport


def stored_bytes(weight: Tensor) -> int:
    """Bytes of a weight as it is kept; of a packed one those of its codes and scales."""
    if isinstance(weight, IntScaleTensor):
        return sum(getattr(weight, name).nbytes for name in weight.data_names)
    return weight.numel() * weight.element_size()


def unpacked_bytes(weight: Tensor) -> int:
    """Bytes of a weight in the dtype that it has, or claims to have."""
    return weight.numel() * weight.dtype.itemsize


def refused_layer(
    candidate: Candidate, name: str, weight: Optional[Tensor], graph: int, reason: Optional[Reason]
) -> LayerReport:
    """The report of a product that was left alone."""
    shape = candidate.shape
    size = weight.numel() if weight is not None else shape[0] * shape[1] if shape else 0
    text = (reason.name, reason.value) if reason else ("UNKNOWN", "")
    kept = (0, 0) if weight is None else (unpacked_bytes(weight), stored_bytes(weight))
    return LayerReport(
        name, shape, candidate.tokens, False, *text, parameters=size, bytes_before=kept[0], bytes_after=kept[1], graph=graph
    )  # fmt: skip


def quantized_layer(
    candidate: Candidate, name: str, packed: IntScaleTensor, graph: int, gemm: Optional[int], kernel: str
) -> LayerReport:
    """The report of a product that runs quantized."""
    assert candidate.shape is not None
    experts = packed.shape[0] if packed.dim() == 3 else None
    scales, counts = torch.unique(packed.group_scale, return_counts=True)
    return LayerReport(
        name,
        candidate.shape,
        candidate.tokens,
        True,
        None,
        "",
        packed.group_size,
        packed.weight_bits,
        (int(scales[0]), int(scales[-1])),
        math.log2((fmt.INT32_MAX + 1) / max(1, int(packed.accumulator_bound().max()))),
        kernel,
        gemm,
        candidate.shape[0] * candidate.shape[1] * (experts or 1),
        experts,
        _activation(packed),
        packed.zero_point is not None,
        unpacked_bytes(packed),
        stored_bytes(packed),
        dict(zip(scales.tolist(), counts.tolist())),
        graph,
    )


def _activation(packed: IntScaleTensor) -> str:
    rotation = f"hadamard {packed.rotation}, " if packed.rotation else ""
    order = "input order, " if packed.input_order is not None else ""
    return rotation + order + ("per token" if packed.act_pre_scale is None else "static")


def not_reached(model: nn.Module, seen: set[int]) -> Iterator[LayerReport]:
    """Weights of products that no graph holds: the compiler never saw them, which says nothing by itself."""
    kinds = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.modules.conv._ConvNd)
    for name, module in model.named_modules():
        yield from _stacks_not_reached(module, name, seen)
        if not isinstance(module, kinds) and not is_conv1d(module):
            continue
        for leaf, parameter in module.named_parameters(name, recurse=False):
            weight = local_tensor(parameter)
            if weight.dim() > 1 and "weight" in leaf and id(weight) not in seen:
                seen.add(id(weight))
                rows = weight.shape[-1 if is_conv1d(module) else 0]
                yield _absent(leaf, (rows, weight.numel() // rows), Reason.NOT_REACHED, weight)


def _stacks_not_reached(module: nn.Module, name: str, seen: set[int]) -> Iterator[LayerReport]:
    """Stacks of experts that no graph holds: a loop over experts breaks the graph. Quantized ones still run quantized."""
    for leaf, transposed in expert_stacks(module).items():
        weight = local_tensor(getattr(module, leaf))
        if id(weight) not in seen:
            reason = Reason.NOT_REACHED if isinstance(weight, IntScaleTensor) else Reason.EXPERTS
            experts, *matrix = weight.shape
            shape = (matrix[1], matrix[0]) if transposed else (matrix[0], matrix[1])
            yield _absent(f"{name}.{leaf}" if name else leaf, shape, reason, weight, experts)


def _absent(
    name: str, shape: tuple[int, int], reason: Reason, weight: Tensor, experts: Optional[int] = None
) -> LayerReport:
    before, after = unpacked_bytes(weight), stored_bytes(weight)
    return LayerReport(
        name, shape, "-", False, reason.name, reason.value, parameters=weight.numel(), experts=experts,
        bytes_before=before, bytes_after=after,
    )  # fmt: skip
