"""Reports of the fused products in a graph: what they move, how long a roofline says they take, and how long they took."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ..kernels.integer.linear import LINEAR_OP as INTEGER_LINEAR
from ..kernels.w4a8_gated import GATED_OP
from ..kernels.w4a8_grouped import GROUPED_OP
from ..kernels.w4a8_linear import ACCUMULATE_OP, LINEAR_OP
from ..kernels.w4a8_residual import LINEAR_ADD_OP
from ..passes import GraphRewrite
from ..passes.base import example
from ..tensors.intscale_tensor import IntScaleTensor
from .records import GemmReport
from .roofline import Gpu, predict_us

PRODUCTS = (LINEAR_OP, LINEAR_ADD_OP, GATED_OP, GROUPED_OP, INTEGER_LINEAR, ACCUMULATE_OP)
RUNS, LEAST_SECONDS = 5, 0.02  # of a measurement; the median of at least so many runs


def gemm_report(
    node: fx.Node, rewrite: GraphRewrite, number: int, layers: tuple[str, ...], kernel: str, gpu: Optional[Gpu]
) -> GemmReport:
    """The report of one fused product, without a measured time."""
    packed: IntScaleTensor = node.meta["intscale_tensor"]
    candidate = node.meta["intscale_candidates"][0]
    report = GemmReport(number, layers, (packed.out_features, packed.in_features), candidate.tokens, kernel)
    result, xq = example(node), example(node.args[0])
    rows = None if not isinstance(result, Tensor) else _hint(math.prod(result.shape[:-1]))
    read = None if not isinstance(xq, Tensor) else _hint(math.prod(xq.shape[:-1]))
    if rows is None or read is None:
        return report
    experts = min(packed.shape[0], rows) if packed.dim() == 3 else 1  # no more of a stack than rows can choose
    matrices = packed.shape[0] if packed.dim() == 3 else 1
    weight = sum(getattr(packed, name).nbytes for name in packed.data_names) * experts // matrices
    moved = weight + read * (packed.in_features + 4) + rows * result.shape[-1] * result.element_size()
    if node.target is LINEAR_ADD_OP:  # the residual
        moved += rows * result.shape[-1] * result.element_size()
    if gpu is None:
        return GemmReport(**{**vars(report), "moved_bytes": int(moved)})
    predicted, limit = predict_us(gpu, moved, 2.0 * rows * packed.out_features * packed.in_features)
    return GemmReport(**{**vars(report), "moved_bytes": int(moved), "predicted_us": predicted, "limit": limit})


def _hint(size: Any) -> Optional[int]:
    """A size as a number; of a symbol the value that it had; None for one that depends on data."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return None if hint is None else int(hint)


def measure_us(node: fx.Node, rewrite: GraphRewrite) -> float:
    """Median time of one fused product in eager mode, with its own weight and random codes for the activation."""
    call = _call(node, rewrite)
    device = node.meta["intscale_tensor"].device
    with torch.no_grad():
        call()
        return _cuda_us(call) if device.type == "cuda" else _cpu_us(call)


def _cpu_us(call: Callable[[], Any]) -> float:
    times: list[float] = []
    while len(times) < RUNS or sum(times) < LEAST_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _cuda_us(call: Callable[[], Any]) -> float:
    """By CUDA events around several launches, which hide what a launch costs the host where the kernel takes longer."""
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 100)
    return statistics.median(times)


def _call(node: fx.Node, rewrite: GraphRewrite) -> Callable[[], Any]:
    target: Any = node.target
    experts = node.meta["intscale_tensor"].shape[0]
    values: list[Any] = []
    for argument, given in zip(target._schema.arguments, node.args):
        value: Any = _tensor(given, rewrite) if isinstance(given, fx.Node) else given
        if isinstance(given, fx.Node) and argument.name == "offsets":  # rows in equal parts
            rows = _hint(example(node).shape[0]) or 0
            value = torch.linspace(0, rows, experts + 1, device=value.device)[1:].to(value.dtype)
        elif isinstance(given, fx.Node) and argument.name == "row_index":
            value %= values[0].shape[0]
        values.append(value)
    kwargs = {key: _tensor(a, rewrite) if isinstance(a, fx.Node) else a for key, a in node.kwargs.items()}
    return lambda: target(*values, **kwargs)


def _tensor(node: fx.Node, rewrite: GraphRewrite) -> Any:
    """The weight behind a node, or something with the shape and dtype of its value."""
    if node in rewrite.packed_inputs:
        recipe, part = rewrite.packed_inputs[node]
        value = recipe.resolve(rewrite.example_inputs)
        return value if part is None else getattr(value, part)
    like = example(node)
    shape = [_hint(size) or 0 for size in like.shape]
    if like.dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=like.device)
    if like.dtype == torch.int32 and like.dim() > 1:  # dyadic scales
        return torch.ones(shape, device=like.device, dtype=like.dtype)
    if like.dtype in (torch.int32, torch.int64):  # an order of rows
        return torch.arange(shape[0], device=like.device, dtype=like.dtype)
    return torch.rand(shape, device=like.device).to(like.dtype) * 0.01
