"""One record for each product, each GEMM and each part of a graph, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from ..passes.collective_report import CollectiveReport
from ..passes.integer.bounds import Bound
from ..reasons import Reason
from ..versions import __version__

NO_PRODUCT = (Reason.EMBEDDING.name, Reason.NOT_MULTIPLIED.name)
SCHEMA = 1  # of to_dict(); raised when a key changes its meaning or goes


@dataclass(frozen=True)
class LayerReport:
    """One product of an activation with a weight, or a parameter of two or more dimensions that is in none.

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
        activation: how its activation is quantized: ``"per token"`` or ``"static"``, after ``"hadamard 2048"`` where it is
            rotated in blocks of 2048 before, or ``"input order"`` where its features are gathered in the weight's order.
        asymmetric: whether its groups have zero points.
        bytes_before, bytes_after: of the weight in its own dtype, and as the graph reads it.
        scale_counts: how many groups have each integer scale.
        graph: number of the graph that holds the product, from 1; None where none does.
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
    activation: str = ""
    asymmetric: bool = False
    bytes_before: int = 0
    bytes_after: int = 0
    scale_counts: dict[int, int] = field(default_factory=dict)
    graph: Optional[int] = None

    @property
    def decision(self) -> str:
        """``W4A8`` and so on, or the name of the reason."""
        if not self.quantized:
            return str(self.reason)
        return f"W{self.weight_bits}A8" + (" asymmetric" if self.asymmetric else "")


@dataclass(frozen=True)
class GemmReport:
    """One fused product in a compiled graph.

    Attributes:
        number: as in ``LayerReport.gemm``.
        layers: names of the weights that it multiplies with.
        shape: output and input features ``(N, K)`` of all of them together.
        tokens: rows of the activation.
        kernel: what runs it.
        moved_bytes: packed weights, quantized activation and output, each once; None where the rows are not known.
        predicted_us: by the roofline of ``Explanation.gpu``; None where that or the rows are not known.
        limit: what the roofline says limits it: ``"memory"`` or ``"int8"``.
        measured_us: on the device of the model; None where it was not measured.
    """

    number: int
    layers: tuple[str, ...]
    shape: tuple[int, int]
    tokens: str
    kernel: str
    moved_bytes: Optional[int] = None
    predicted_us: Optional[float] = None
    limit: str = ""
    measured_us: Optional[float] = None


@dataclass(frozen=True)
class GraphPart:
    """The nodes of one repeated layer, or of what is outside of them, in every stage of the compilation.

    Attributes:
        graph: number of the graph, from 1.
        name: dotted name of the layer; empty for what belongs to none.
        alike: names of the layers whose nodes are the same but for their weights, this one first.
        stages: name of a stage and its nodes as lines of Python. The first is ``"dynamo"``, before any pass; then every pass.
    """

    graph: int
    name: str
    alike: tuple[str, ...]
    stages: tuple[tuple[str, tuple[str, ...]], ...]

    def changed_by(self) -> list[str]:
        """Names of the passes that changed these nodes."""
        pairs = zip(self.stages, self.stages[1:])
        return [name for (_, before), (name, after) in pairs if after != before]


@dataclass(frozen=True)
class Records:
    """What is known of a model and its graphs.

    Attributes:
        layers: every product with a weight.
        graphs: number of graphs that Dynamo made.
        gemms: fused products in them.
        activation_quantizations: quantizations of activations in them.
        parameters, quantized_parameters: of the model, and those among them that run quantized.
        pass_counts: how often each pass matched.
        notes: what else there is to know.
        bytes_before, bytes_after: of all parameters in their own dtypes, and as the graphs read them.
        gemm_reports: the fused products one by one.
        parts: the graphs in every stage.
        graph_breaks: where and why Dynamo ended a graph.
        blocks: dotted names of the repeated layers.
        modules: class names of the modules that hold a layer, by dotted name; the model itself is ``""``.
        gpu: the GPU whose roofline predicts times, with its rates; None where it is not known.
        gpu_assumed: whether no such GPU is here.
        device: where the model is.
        settings: mode and options that were in force.
        collectives: the collectives of the graphs, where quantized communication was asked for.
        integer_ops: how often an integer-only model calls each op.
        integer_bounds: the bits that the values in these ops can need, and those that there are.
    """

    layers: tuple[LayerReport, ...]
    graphs: int
    gemms: int
    activation_quantizations: int
    parameters: int
    quantized_parameters: int
    pass_counts: dict[str, int]
    notes: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    gemm_reports: tuple[GemmReport, ...] = ()
    parts: tuple[GraphPart, ...] = ()
    graph_breaks: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    gpu: Optional[dict[str, Any]] = None
    gpu_assumed: bool = False
    device: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    collectives: tuple[CollectiveReport, ...] = ()
    integer_ops: dict[str, int] = field(default_factory=dict)
    integer_bounds: tuple[Bound, ...] = ()

    @property
    def quantized_fraction(self) -> float:
        """Quantized weights as a fraction of all parameters of the model."""
        return self.quantized_parameters / self.parameters if self.parameters else 0.0

    @property
    def products(self) -> tuple[LayerReport, ...]:
        """Layers without the rows of parameters that are the weight of no product, such as embeddings."""
        return tuple(layer for layer in self.layers if layer.reason not in NO_PRODUCT)

    @property
    def fallbacks(self) -> tuple[LayerReport, ...]:
        """Products that were left in their original precision."""
        return tuple(layer for layer in self.products if not layer.quantized)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serializable data; ``"schema"`` is the version of its keys."""
        data = dataclasses.asdict(self)
        for layer in data["layers"]:
            layer["scale_counts"] = {str(scale): count for scale, count in layer["scale_counts"].items()}
        for part in data["parts"]:
            part["stages"] = [{"name": name, "lines": list(lines)} for name, lines in part["stages"]]
        return {"schema": SCHEMA, "version": __version__, **lists(data)}


def lists(value: Any) -> Any:
    """Tuples as lists, as JSON has them, so that a dictionary equals what is read back."""
    if isinstance(value, dict):
        return {key: lists(entry) for key, entry in value.items()}
    return [lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value
