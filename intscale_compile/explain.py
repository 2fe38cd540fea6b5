"""``explain``: what the compiler did to every linear layer of a model, and why."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from . import format as fmt
from .backend import bind, rewrite_graph
from .kernels.quantize_per_token import OP as QUANTIZE_OP
from .kernels.w4a8_linear import LINEAR_OP
from .options import parse_options
from .passes import Candidate, GraphRewrite
from .tensor import IntScaleTensor

_calls = itertools.count()


@dataclass(frozen=True)
class LayerReport:
    """One product of an activation with a weight.

    Attributes:
        name: dotted name of the weight.
        shape: output and input features ``(N, K)``; None where it is not a matrix.
        tokens: rows of the activation.
        quantized: whether it runs as W4A8.
        reason: why not, as a member name of ``Reason``; None where it does.
        explanation: the reason in words, with the mend.
        group_size, weight_bits: of the stored weight; None where it is not quantized.
        scale_range: least and greatest integer group scale.
        headroom_bits: ``log2(2**31 / bound)`` of the worst row: how far the accumulator is from overflow, proved.
        kernel: what runs it.
        gemm: number of the GEMM it is part of; siblings share one.
        parameters: number of weights.
    """

    name: str
    shape: Optional[tuple[int, int]]
    tokens: str
    quantized: bool
    reason: Optional[str]
    explanation: str
    group_size: Optional[int] = None
    weight_bits: Optional[int] = None
    scale_range: Optional[tuple[int, int]] = None
    headroom_bits: Optional[float] = None
    kernel: str = ""
    gemm: Optional[int] = None
    parameters: int = 0


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``print`` it for a table."""

    layers: tuple[LayerReport, ...]
    graphs: int
    gemms: int
    activation_quantizations: int
    parameters: int
    quantized_parameters: int
    pass_counts: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def quantized_fraction(self) -> float:
        """Quantized weights as a fraction of all parameters of the model."""
        return self.quantized_parameters / self.parameters if self.parameters else 0.0

    @property
    def fallbacks(self) -> tuple[LayerReport, ...]:
        """Layers that were left in their original precision."""
        return tuple(layer for layer in self.layers if not layer.quantized)

    def __str__(self) -> str:
        rows = [_HEADER, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        reasons = sorted({f"{layer.reason}: {layer.explanation}" for layer in self.fallbacks})
        return "\n".join([*lines, "", *reasons, *self.notes, self._totals()])

    def _totals(self) -> str:
        done = len(self.layers) - len(self.fallbacks)
        total = (
            f"{done} of {len(self.layers)} linear layers quantized, in {self.gemms} GEMMs with "
            f"{self.activation_quantizations} activation quantizations; {self.graphs} graph(s); "
            f"{self.quantized_fraction:.1%} of {self.parameters:,} parameters."
        )
        return total if done else f"NOTHING WAS QUANTIZED. {total}"

    __repr__ = __str__


_HEADER = ("layer", "N x K", "tokens", "decision", "group", "scales", "headroom", "gemm", "kernel")


def _row(layer: LayerReport) -> tuple[str, ...]:
    shape = f"{layer.shape[0]} x {layer.shape[1]}" if layer.shape else "-"
    if not layer.quantized:
        return (layer.name, shape, layer.tokens, str(layer.reason), "-", "-", "-", "-", "-")
    assert layer.scale_range is not None
    return (
        layer.name,
        shape,
        layer.tokens,
        f"W{layer.weight_bits}A8",
        "channel" if layer.group_size == -1 else str(layer.group_size),
        f"{layer.scale_range[0]}..{layer.scale_range[1]}",
        f"{layer.headroom_bits:.1f} bits",
        str(layer.gemm),
        layer.kernel,
    )


def explain(
    model: nn.Module, *inputs: Any, mode: Optional[str] = None, options: Optional[dict] = None, **kwargs: Any
) -> Explanation:
    """Say what ``torch.compile(model, backend="intscale")`` does with ``model`` for these inputs.

    Runs the model once on the inputs (without Inductor, without gradients) and reports every linear product.
    Weights that it quantizes are kept for a compilation that follows.

    Args:
        model: a module, compiled or not.
        inputs, kwargs: what the model is called with.
        mode, options: as for ``torch.compile``.

    Raises:
        ConfigError: an option is unknown.
    """
    settings, patches = parse_options(mode, options)
    module = getattr(model, "_orig_mod", model)
    rewrites: list[GraphRewrite] = []

    def collect(gm, example_inputs):
        rewrite = rewrite_graph(gm, example_inputs, settings)
        rewrites.append(rewrite)
        return bind(rewrite, lambda graph, _: graph.forward)

    with torch.no_grad():
        torch.compile(_fresh_call(), backend=collect)(module, inputs, kwargs)
    return _explanation(module, rewrites, bool(patches.get("triton.cudagraphs")))


def _fresh_call() -> Callable:
    """A function that calls a model, with a code object of its own: Dynamo keeps what it compiles by code object, so
    neither what the user compiled before nor its recompilation limit is touched."""

    def call(model, inputs, kwargs):
        return model(*inputs, **kwargs)

    return types.FunctionType(call.__code__.replace(co_name=f"explain_{next(_calls)}"), globals())


def _explanation(model: nn.Module, rewrites: list[GraphRewrite], cuda_graphs: bool) -> Explanation:
    layers: list[LayerReport] = []
    notes: set[str] = set()
    weights: dict[int, int] = {}
    gemms = quantizations = 0
    for rewrite in rewrites:
        number: dict[int, tuple[int, str]] = {}
        for node in rewrite.graph.nodes:
            quantizations += node.target is QUANTIZE_OP
            if node.target is LINEAR_OP:
                gemms += 1
                packed = node.meta["intscale_tensor"]
                for candidate in node.meta["intscale_candidates"]:
                    number[id(candidate)] = (gemms, _kernel(packed, candidate.tokens, cuda_graphs))
                notes |= _kernel_notes(packed)
        for candidate in rewrite.candidates:
            layers.append(_layer(candidate, *number.get(id(candidate), (None, ""))))
            if candidate.packed is not None and candidate.source is not None:
                weights[id(candidate.source.tensor(rewrite.example_inputs))] = candidate.packed.numel()
    counts: dict[str, int] = {}
    for rewrite in rewrites:
        for name, count in rewrite.counts.items():
            counts[name] = counts.get(name, 0) + count
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    quantized = sum(weights.values())
    return Explanation(
        tuple(layers), len(rewrites), gemms, quantizations, total, quantized, counts, tuple(sorted(notes))
    )


def _layer(candidate: Candidate, gemm: Optional[int], kernel: str) -> LayerReport:
    shape = candidate.shape
    size = shape[0] * shape[1] if shape else 0
    if candidate.packed is None:
        reason = candidate.reason
        name, text = (reason.name, reason.value) if reason else ("UNKNOWN", "")
        return LayerReport(candidate.name, shape, candidate.tokens, False, name, text, parameters=size)
    packed: IntScaleTensor = candidate.packed
    scale = packed.group_scale
    headroom = math.log2((fmt.INT32_MAX + 1) / max(1, int(packed.accumulator_bound().max())))
    return LayerReport(
        candidate.name,
        shape,
        candidate.tokens,
        True,
        None,
        "",
        packed.group_size,
        packed.weight_bits,
        (int(scale.min()), int(scale.max())),
        headroom,
        kernel,
        gemm,
        size,
    )


def _kernel(packed: IntScaleTensor, tokens: str, cuda_graphs: bool) -> str:
    schedule = "int8" if packed.weight_bits == 8 else "fold" if packed.scale_bits <= 4 else "accumulate"
    if packed.device.type != "cuda":
        return f"oneDNN {schedule}"
    from .kernels.template import GLUON_TOKENS
    from .kernels.triton_gemm import pick_tile

    rows = int(tokens) if tokens.isdigit() else 1024
    gluon = _gluon_obstacle(packed) is None and (cuda_graphs or rows >= GLUON_TOKENS)
    shape = (packed.out_features, packed.in_features)
    tile = pick_tile(rows, *shape, packed.group_size, packed.scale_bits, packed.weight_bits, packed.device, gluon)
    name = "triton" if tile.kernel == "triton" else f"gluon {tile.kernel}"
    return f"{name} {schedule} {tile.block_n}x{tile.block_m}"


def _gluon_obstacle(packed: IntScaleTensor) -> Optional[str]:
    from .kernels.triton_gemm import gluon_obstacle

    return gluon_obstacle(
        packed.in_features,
        packed.group_size,
        packed.scale_bits,
        packed.weight_bits,
        packed.packing_format,
        packed.device,
    )


def _kernel_notes(packed: IntScaleTensor) -> set[str]:
    """Why a weight on a GPU runs in plain Triton although Gluon kernels exist."""
    obstacle = _gluon_obstacle(packed) if packed.device.type == "cuda" else None
    return {f"plain Triton instead of Gluon: {obstacle}."} if obstacle else set()
