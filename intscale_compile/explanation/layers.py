"""Reports of single layers: those that a graph holds, and those that none does."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from .. import format as fmt
from ..passes import Candidate
from ..reasons import Reason
from ..tensors.intscale_tensor import IntScaleTensor
from .records import LayerReport

NO_GRAPH = "eager: in no graph"  # kernel of a quantized weight that the compiler did not see
NOT_MATCHED = "unfused: in a form that no pass knows"  # of one that the graph uses as it is: its own operators run


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
    rows = candidate.source.rows if candidate.source is not None else None
    shape = (
        candidate.shape if rows is None else (packed.out_features, packed.in_features)
    )  # the weight's, of which it is a part
    return _quantized(name, shape, candidate.tokens, packed, graph, gemm, kernel)


def eager_layer(name: str, packed: IntScaleTensor) -> LayerReport:
    """The report of a quantized weight that no graph holds: where it is called, its own operators run it."""
    return _quantized(name, (packed.out_features, packed.in_features), "-", packed, None, None, NO_GRAPH)


def unmatched_layer(row: LayerReport, packed: IntScaleTensor) -> LayerReport:
    """The report of a quantized weight whose products no pass rewrote: the graph has its own operators."""
    shape = (packed.out_features, packed.in_features)
    return _quantized(row.name, shape, row.tokens, packed, row.graph, None, NOT_MATCHED)


def _quantized(
    name: str, shape: tuple[int, int], tokens: str, packed: IntScaleTensor, graph: Optional[int], gemm: Optional[int],
    kernel: str,
) -> LayerReport:  # fmt: skip
    experts = packed.shape[0] if packed.dim() == 3 else None
    scales, counts = torch.unique(packed.group_scale, return_counts=True)
    return LayerReport(
        name,
        shape,
        tokens,
        True,
        None,
        "",
        packed.group_size,
        packed.weight_bits,
        (int(scales[0]), int(scales[-1])),
        math.log2((fmt.INT32_MAX + 1) / max(1, int(packed.accumulator_bound().max()))),
        kernel,
        gemm,
        shape[0] * shape[1] * (experts or 1),
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


def plain_layer(name: str, weight: Tensor, reason: Reason, transposed: bool) -> LayerReport:
    """The report of a parameter that is the weight of no product in a graph; a stack of matrices is one of experts."""
    shape: Optional[tuple[int, int]] = None
    experts = weight.shape[0] if reason is Reason.EXPERTS else None
    if weight.dim() == 2 or experts:
        shape = (weight.shape[-2], weight.shape[-1])
        shape = shape[::-1] if transposed else shape
    elif reason is Reason.CONVOLUTION:
        shape = (weight.shape[0], weight[0].numel() if weight.shape[0] else 0)
    return LayerReport(
        name, shape, "-", False, reason.name, reason.value, parameters=weight.numel(), experts=experts,
        bytes_before=unpacked_bytes(weight), bytes_after=stored_bytes(weight),
    )  # fmt: skip
