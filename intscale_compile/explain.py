"""``explain``: what the compiler did to every linear layer of a model, and why."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from . import format as fmt
from .backend import bind, rewrite_graph
from .expert_layers import expert_stacks
from .kernels.quantize_per_token import OP as QUANTIZE_OP
from .kernels.w4a8_gated import GATED_OP
from .kernels.w4a8_grouped import GROUPED_OP
from .kernels.w4a8_linear import LINEAR_OP
from .options import parse_options
from .passes import Candidate, GraphRewrite
from .quantize import is_conv1d
from .reasons import Reason
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
        experts: matrices in the stack, of a mixture of experts; None for a single one.
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
    experts: Optional[int] = None


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
    shape = " x ".join(map(str, ((layer.experts,) if layer.experts else ()) + layer.shape)) if layer.shape else "-"
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
    cuda_graphs = bool(patches.get("triton.cudagraphs"))
    module = getattr(model, "_orig_mod", model)
    rewrites: list[GraphRewrite] = []

    def collect(gm, example_inputs):
        rewrite = rewrite_graph(gm, example_inputs, settings, cuda_graphs)
        rewrites.append(rewrite)
        return bind(rewrite, lambda graph, _: graph.forward)

    with torch.no_grad():
        torch.compile(_fresh_call(), backend=collect)(module, inputs, kwargs)
    return _explanation(module, rewrites, cuda_graphs)


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
    seen: set[int] = set()
    gemms = quantizations = 0
    for rewrite in rewrites:
        number: dict[int, tuple[int, str]] = {}
        for node in rewrite.graph.nodes:
            quantizations += node.target is QUANTIZE_OP
            packed = node.meta.get("intscale_tensor")
            # Without the weight: an eager linear that Dynamo compiled alone.
            if node.target in (LINEAR_OP, GATED_OP, GROUPED_OP) and packed is not None:
                gemms += 1
                activation = node.args[6] if node.target is GATED_OP else None
                for candidate in node.meta["intscale_candidates"]:
                    number[id(candidate)] = (gemms, _kernel(packed, candidate.tokens, cuda_graphs, activation))
                notes |= _kernel_notes(packed)
        for candidate in rewrite.candidates:
            layers.append(_layer(candidate, *number.get(id(candidate), (None, ""))))
            if candidate.source is not None:
                weight = candidate.source.tensor(rewrite.example_inputs)
                seen.add(id(weight))
                if candidate.packed is not None:
                    weights[id(weight)] = candidate.packed.numel()
    layers += _not_reached(model, seen)
    counts: dict[str, int] = {}
    for rewrite in rewrites:
        for name, count in rewrite.counts.items():
            counts[name] = counts.get(name, 0) + count
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    quantized = sum(weights.values())
    return Explanation(
        tuple(layers), len(rewrites), gemms, quantizations, total, quantized, counts, tuple(sorted(notes))
    )


def _not_reached(model: nn.Module, seen: set[int]) -> Iterator[LayerReport]:
    """Weights of products that no graph holds: the compiler never saw them, which says nothing by itself."""
    kinds = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.modules.conv._ConvNd)
    for name, module in model.named_modules():
        yield from _stacks_not_reached(module, name, seen)
        if not isinstance(module, kinds) and not is_conv1d(module):
            continue
        for leaf, weight in module.named_parameters(name, recurse=False):
            if weight.dim() > 1 and "weight" in leaf and id(weight) not in seen:
                seen.add(id(weight))
                rows = weight.shape[-1 if is_conv1d(module) else 0]
                shape, reason = (rows, weight.numel() // rows), Reason.NOT_REACHED
                yield LayerReport(leaf, shape, "-", False, reason.name, reason.value, parameters=weight.numel())


def _stacks_not_reached(module: nn.Module, name: str, seen: set[int]) -> Iterator[LayerReport]:
    """Stacks of experts that no graph holds: a loop over experts breaks the graph. Quantized ones still run quantized."""
    for leaf, transposed in expert_stacks(module).items():
        weight = getattr(module, leaf)
        if id(weight) not in seen:
            reason = Reason.NOT_REACHED if isinstance(weight, IntScaleTensor) else Reason.EXPERTS
            experts, *matrix = weight.shape
            shape = (matrix[1], matrix[0]) if transposed else (matrix[0], matrix[1])
            full, size = f"{name}.{leaf}" if name else leaf, weight.numel()
            yield LayerReport(
                full, shape, "-", False, reason.name, reason.value, parameters=size, experts=experts
            )  # fmt: skip


def _layer(candidate: Candidate, gemm: Optional[int], kernel: str) -> LayerReport:
    shape = candidate.shape
    size = shape[0] * shape[1] if shape else 0
    if candidate.packed is None:
        reason = candidate.reason
        name, text = (reason.name, reason.value) if reason else ("UNKNOWN", "")
        return LayerReport(candidate.name, shape, candidate.tokens, False, name, text, parameters=size)
    packed: IntScaleTensor = candidate.packed
    experts = packed.shape[0] if packed.dim() == 3 else None
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
        size * (experts or 1),
        experts,
    )


def _kernel(packed: IntScaleTensor, tokens: str, cuda_graphs: bool, activation: Optional[str] = None) -> str:
    schedule = "int8" if packed.weight_bits == 8 else "fold" if packed.scale_bits <= 4 else "accumulate"
    grouped, behind = packed.dim() == 3, f" + {activation}" if activation else ""
    if packed.device.type != "cuda":
        return f"oneDNN {'grouped ' if grouped else ''}{schedule}{behind}"
    from .kernels.template import GLUON_TOKENS
    from .kernels.triton_gated import pick_gated_tile
    from .kernels.triton_gemm import pick_tile

    rows = int(tokens) if tokens.isdigit() else 1024
    if grouped:
        from .kernels.grouped_tiles import choose_grouped_tile
        from .kernels.triton_gemm import capability

        sizes = (packed.shape[0], packed.out_features, packed.in_features)
        form = (packed.group_size, packed.scale_bits, packed.weight_bits)
        tile = choose_grouped_tile(rows, *sizes, *form, capability(packed.device))
        return f"triton grouped {schedule} {tile.block_n}x{tile.block_m}"
    gluon = _gluon_obstacle(packed) is None and (cuda_graphs or rows >= GLUON_TOKENS or activation is not None)
    shape = (packed.out_features, packed.in_features)
    pick = pick_gated_tile if activation else pick_tile
    tile = pick(rows, *shape, packed.group_size, packed.scale_bits, packed.weight_bits, packed.device, gluon)
    name = "triton" if tile.kernel == "triton" else f"gluon {tile.kernel}"
    return f"{name} {schedule} {tile.block_n}x{tile.block_m}{behind}"


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
    obstacle = _gluon_obstacle(packed) if packed.device.type == "cuda" and packed.dim() == 2 else None
    return {f"plain Triton instead of Gluon: {obstacle}."} if obstacle else set()
