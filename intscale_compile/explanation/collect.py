"""Run a model once with our passes, without Inductor, and gather what they did."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, fx, nn

from ..backend import collectives_pass, note_collectives
from ..compile.binding import bind, rewrite_graph
from ..debug.captured import fresh_call
from ..integrations.dynamo_frames import LeftFrame, left_frames
from ..integrations.registry import fallbacks
from ..integrations.torch import local_tensor
from ..kernels.arguments import GatedArguments, arguments_of
from ..kernels.hadamard import HADAMARD_QUANTIZE_OP
from ..kernels.integer.rows import QUANTIZERS as INTEGER_QUANTIZERS
from ..kernels.quantize_per_token import OP as QUANTIZE_OP
from ..kernels.quantize_static import STATIC_OP
from ..kernels.w4a8_gated import GATED_OP
from ..kernels.w4a8_residual import LINEAR_ADD_OP
from ..passes import Candidate, GraphRewrite
from ..passes.insert_qdq import recipe_of
from ..passes.integer.bounds import Bound, bounds_of, count_ops
from ..passes.settings import Settings
from ..quantization.output_probe import probe_result
from ..reasons import Reason
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.untied import untied_notes
from .blocks import TensorNames, block_of, repeated_blocks, without_wrappers
from .gemms import PRODUCTS, gemm_report, measure_us
from .graphs import GraphRecorder
from .kernels import kernel_name, kernel_notes
from .layers import quantized_layer, refused_layer, stored_bytes, unpacked_bytes
from .parameters import Rows, Use, eager_notes, other_parameters, uses_of
from .records import GemmReport, GraphPart, LayerReport
from .report import Explanation
from .roofline import ASSUMED, Gpu, gpu_of_device

if TYPE_CHECKING:
    from ..passes.quantize_collectives import QuantizeCollectives

NOT_FUSED = "not fused"  # in Q/DQ form: the pass that fuses it is turned off
QUANTIZERS = (QUANTIZE_OP, STATIC_OP, HADAMARD_QUANTIZE_OP, *INTEGER_QUANTIZERS)


class SeenGraph:
    """One graph that Dynamo made: what the passes did to it, and with which weights it was called.

    Where a graph breaks inside of a layer, one graph serves all layers of its kind.
    """

    def __init__(self, rewrite: GraphRewrite, parts: list[GraphPart], uses: dict[int, Use]):
        self.rewrite = rewrite
        self.parts = parts
        self.uses = uses
        self.others: dict[int, tuple[int, Tensor]] = {}  # index and tensor of each parameter that came in, by its id
        self.weights: list[dict[int, Tensor]] = []  # by index of the input, one entry for each set of weights
        sources = (candidate.source for candidate in rewrite.candidates)
        self._indices = sorted({s.index for s in sources if s is not None and s.index is not None})
        self._known: set[tuple[int, ...]] = set()
        self.called(rewrite.example_inputs)

    def called(self, args: Sequence[Any]) -> None:
        """Remember the weights of a call."""
        self.others |= {id(tensor): (i, tensor) for i in self.uses if (tensor := local_tensor(args[i])) is not None}
        weights = {i: local_tensor(args[i]) for i in self._indices}
        key = tuple(map(id, weights.values()))
        if key not in self._known:
            self._known.add(key)
            self.weights.append(weights)

    def layers(self, names: TensorNames, number: int, gemms: dict) -> list[tuple[LayerReport, Optional[Tensor]]]:
        """A report of each product for each set of weights, with the weight."""
        return [
            self._layer(candidate, weights, first, names, number, gemms)
            for first, weights in zip(itertools.chain([True], itertools.repeat(False)), self.weights)
            for candidate in self.rewrite.candidates
        ]

    def _layer(
        self, candidate: Candidate, weights: dict[int, Tensor], first: bool, names: TensorNames, number: int, gemms: dict
    ) -> tuple[LayerReport, Optional[Tensor]]:  # fmt: skip
        source = candidate.source
        weight = None if source is None else source.constant if source.index is None else weights[source.index]
        name = candidate.name if weight is None else names(weight, candidate.name)
        packed = candidate.packed
        if packed is None or source is None:
            return refused_layer(candidate, name, weight, number, candidate.reason), weight
        if source.rows is not None or (not first and source.index is not None):
            recipe = recipe_of(candidate, self.rewrite)
            recipe = dataclasses.replace(recipe, sources=(dataclasses.replace(source, rows=None),))
            packed = recipe.resolve([weights.get(i) for i in range(len(self.rewrite.example_inputs))])
        return quantized_layer(candidate, name, packed, number, *gemms.get(id(candidate), (None, NOT_FUSED))), weight

    def parameters(self) -> dict[int, tuple[Tensor, Reason, str, Optional[Candidate]]]:
        """By id of each parameter that came in: it, its use, the node that uses it, and the product that is computed from it."""
        computed = {c.node.name: c for c in self.rewrite.candidates if c.source is None}
        return {
            key: (tensor, self.uses[i].reason, self.uses[i].node.name, computed.get(self.uses[i].node.name))
            for key, (i, tensor) in self.others.items()
        }

    def blocks(self, names: TensorNames, known: frozenset[str]) -> list[str]:
        """The repeated layer that each set of weights belongs to."""
        first = (next(iter(weights.values()), None) for weights in self.weights)
        return list(dict.fromkeys(block_of(names(weight, ""), known) for weight in first))


def run(
    model: nn.Module, inputs: tuple, kwargs: dict, settings: Settings, cuda_graphs: bool, dynamic: Optional[bool]
) -> tuple[list[SeenGraph], list[LeftFrame]]:
    """Call the model once, compiled by our passes alone, without gradients; also the functions that Dynamo left to Python."""
    names, blocks = TensorNames(model), repeated_blocks(model)
    graphs: list[SeenGraph] = []

    def backend(gm, example_inputs):
        recorder = GraphRecorder(len(graphs) + 1, names, blocks)
        uses = uses_of(gm.graph, example_inputs)
        rewrite = rewrite_graph(gm, example_inputs, settings, cuda_graphs, recorder)
        graph = SeenGraph(rewrite, recorder.finish(rewrite), uses)
        collectives = collectives_pass(settings, cuda_graphs)
        bound = bind(rewrite, functools.partial(_compile, collectives))
        if collectives is not None:
            note_collectives(rewrite, collectives)
        graphs.append(graph)  # AOTAutograd may make Dynamo start anew

        def call(*args):
            graph.called(args)
            return bound(*args)

        return call

    with torch.no_grad(), left_frames() as left:
        torch.compile(fresh_call(), backend=backend, dynamic=dynamic)(model, inputs, kwargs)
    return graphs, left


def _compile(collectives: Optional[QuantizeCollectives], module: fx.GraphModule, inputs: list[Any]) -> Callable:
    """The graph as it is; where collectives are to be quantized, what AOTAutograd makes of it and then the pass."""
    if collectives is None:
        return module.forward
    # Slow to import.
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def lower(lowered: fx.GraphModule, _: list[Any]) -> Callable:
        collectives(lowered.graph)
        lowered.recompile()
        return make_boxed_func(lowered.forward)

    return aot_autograd(fw_compiler=lower)(module, inputs)


def explanation(
    model: nn.Module, graphs: list[SeenGraph], left: list[LeftFrame], cuda_graphs: bool, gpu: Optional[Gpu], measure: bool,
    settings: dict[str, Any],
) -> Explanation:  # fmt: skip
    """Everything that is known about the graphs of a model; ``settings`` are those that the caller gave."""
    names, blocks = TensorNames(model), repeated_blocks(model)
    device = next((str(p.device) for p in model.parameters()), "cpu")
    rates, assumed = _rates(gpu, device)
    gemms: list[GemmReport] = []
    notes: set[str] = set()
    places = [_gemms(graph, names, len(gemms), cuda_graphs, rates, measure, gemms, notes) for graph in graphs]
    rows = _rows(model, graphs, names, places)
    layers, weights = [_named(layer) for layer in rows.layers], rows.of_weight
    notes |= rows.notes | eager_notes(model, layers) | _left_notes(left) | set(fallbacks())
    notes |= untied_notes(model) | _output_notes(graphs)
    notes |= {str(found) for found in (probe_result(model),) if found is not None and found.hurts}
    local = [local_tensor(p) for p in model.parameters()]
    parameters: dict[int, Tensor] = {id(p): p for p in local}
    before, after = _bytes(parameters, weights)
    return Explanation(
        tuple(layers),
        len(graphs),
        len(gemms),
        sum(node.target in QUANTIZERS for graph in graphs for node in graph.rewrite.graph.nodes),
        sum(p.numel() for p in parameters.values()),
        sum(layer.parameters for layer in weights.values() if layer.quantized),
        _pass_counts(graphs),
        tuple(sorted(notes | _shared_notes(graphs) | _unlike_notes(graphs) | _gradient_notes(model, layers))),
        before,
        after,
        tuple(gemms),
        tuple(_parts(graphs, names, frozenset(blocks))),
        tuple(_graph_breaks(graphs, left)),
        blocks,
        _modules(model, layers),
        None if rates is None else dataclasses.asdict(rates),
        assumed,
        device if not device.startswith("cuda") else torch.cuda.get_device_name(device),
        settings,
        tuple(
            dataclasses.replace(one, graph=number)
            for number, graph in enumerate(graphs, 1)
            for one in graph.rewrite.collectives or ()
        ),
        *_integers([graph for graph in graphs if graph.rewrite.settings.integer_only]),
    )


def _output_notes(graphs: list[SeenGraph]) -> set[str]:
    """What the option for output embeddings did to plain weights."""
    found = (c for graph in graphs for c in graph.rewrite.candidates if c.config is not None and c.packed is not None)
    return {
        f"{c.name}: output embedding, quantized at compile time because intscale.output_embedding asks for it: "
        f"{c.packed.nbytes_packed() / 1e6:.1f} MB beside the original weight, which stays alive"
        for c in found
        if c.packed is not None
    }


def _integers(graphs: list[SeenGraph]) -> tuple[dict[str, int], tuple[Bound, ...]]:
    """How often integer-only graphs call each op, and the largest bound of each value."""
    ops: dict[str, int] = {}
    bounds: dict[tuple[str, str], Bound] = {}
    for graph in graphs:
        for name, count in count_ops(graph.rewrite.graph).items():
            ops[name] = ops.get(name, 0) + count
        for bound in bounds_of(graph.rewrite.graph):
            known = bounds.get((bound.op, bound.value), bound)
            bounds[bound.op, bound.value] = max(bound, known, key=lambda one: one.bits)
    return ops, tuple(bounds.values())


def _rows(
    model: nn.Module, graphs: list[SeenGraph], names: TensorNames, places: list[dict[int, tuple[int, str]]]
) -> Rows:
    """A row for every parameter of two or more dimensions, and for every product whose weight comes from none."""
    rows = Rows()
    used: dict[int, Reason] = {}
    for number, (graph, gemms) in enumerate(zip(graphs, places), 1):
        found = graph.layers(names, number, gemms)
        mine = {id(weight) for _, weight in found if weight is not None}
        parameters = {key: entry for key, entry in graph.parameters().items() if key not in mine}
        stand_in = {id(product) for *_, product in parameters.values() if product is not None}
        for (layer, weight), candidate in zip(found, itertools.cycle(graph.rewrite.candidates)):
            if weight is not None or id(candidate) not in stand_in:
                rows.add(layer, weight)
        for key, (weight, reason, _, product) in parameters.items():
            if product is not None:
                rows.add(refused_layer(product, names(weight, product.name), weight, number, product.reason), weight)
            elif used.get(key) in (None, Reason.NOT_MULTIPLIED):
                used[key] = reason
    for layer, weight in other_parameters(model, set(rows.of_weight), used):
        rows.add(layer, weight)
    return rows


def _rates(gpu: Optional[Gpu], device: str) -> tuple[Optional[Gpu], bool]:
    """The GPU to predict for, and whether it is another one than the model is on."""
    here = gpu_of_device(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None
    if gpu is not None:
        return gpu, gpu != here
    return (here, False) if device.startswith("cuda") else (ASSUMED, True)


def _named(layer: LayerReport) -> LayerReport:
    return dataclasses.replace(layer, name=without_wrappers(layer.name))


def _gemms(
    graph: SeenGraph, names: TensorNames, before: int, cuda_graphs: bool, gpu: Optional[Gpu], measure: bool,
    reports: list[GemmReport], notes: set[str],
) -> dict[int, tuple[int, str]]:  # fmt: skip
    """Appends a report for each fused product; returns number and kernel by id of the candidate."""
    places: dict[int, tuple[int, str]] = {}
    rewrite = graph.rewrite
    measured: dict[tuple, float] = {}
    for node in rewrite.graph.nodes:
        packed: Optional[IntScaleTensor] = node.meta.get("intscale_tensor")
        # Without the weight: an eager linear that Dynamo compiled alone.
        if node.target not in PRODUCTS or packed is None:
            continue
        number = before = before + 1
        behind = "residual" if node.target is LINEAR_ADD_OP else None
        if node.target is GATED_OP:
            behind = arguments_of(GatedArguments, node).activation
        candidates = node.meta["intscale_candidates"]
        members = []
        for candidate in candidates:
            kernel = kernel_name(packed, candidate.tokens, cuda_graphs, behind)
            places[id(candidate)] = number, kernel
            weight = candidate.source.tensor(rewrite.example_inputs)
            members.append(without_wrappers(names(weight, candidate.name)))
        report = gemm_report(node, rewrite, number, tuple(members), kernel, gpu)
        if measure:
            key = (node.target, report.shape, report.tokens, report.moved_bytes, kernel)
            if key not in measured:
                measured[key] = measure_us(node, rewrite)
            report = dataclasses.replace(report, measured_us=measured[key])
        reports.append(report)
        notes |= kernel_notes(packed)
    return places


def _bytes(parameters: dict[int, Tensor], layers: dict[int, LayerReport]) -> tuple[int, int]:
    """Bytes of all parameters: in their own dtypes, and as the graphs read them."""
    before = after = 0
    for key, parameter in parameters.items():
        layer = layers.get(key)
        before += unpacked_bytes(parameter)
        after += layer.bytes_after if layer is not None and layer.quantized else stored_bytes(parameter)
    return before, after


def _pass_counts(graphs: list[SeenGraph]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for graph in graphs:
        for name, count in graph.rewrite.counts.items():
            counts[name] = counts.get(name, 0) + count
    return counts


def _parts(graphs: list[SeenGraph], names: TensorNames, blocks: frozenset[str]) -> list[GraphPart]:
    """The parts of all graphs; where one graph serves several layers, its part is alike for all of them."""
    parts = []
    for graph in graphs:
        served = [block for block in graph.blocks(names, blocks) if block]
        for part in graph.parts:
            alike = served if len(graph.weights) > 1 and part.name in served else part.alike
            parts.append(dataclasses.replace(part, alike=tuple(alike)))
    return parts


def _shared_notes(graphs: list[SeenGraph]) -> set[str]:
    shared = [(number, len(graph.weights)) for number, graph in enumerate(graphs, 1) if len(graph.weights) > 1]
    return {f"graph {number} runs for {count} layers, with the weights of each in turn." for number, count in shared}


def _unlike_notes(graphs: list[SeenGraph]) -> set[str]:
    """Siblings that are not merged because they take their activation differently."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for graph in graphs:
        for how, found in graph.rewrite.unlike.items():
            pairs.setdefault(how, []).extend(found)
    return {
        f"{found[0][0]} and {found[0][1]} read one activation {how}, and are not merged"
        + (f"; nor are {len(found) - 1} more pairs." if len(found) > 1 else ".")
        for how, found in pairs.items()
    }


def _gradient_notes(model: nn.Module, layers: list[LayerReport]) -> set[str]:
    """What would be otherwise where autograd watches: ``explain`` runs without gradients."""
    plain = {
        without_wrappers(name) for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad and not isinstance(p, IntScaleTensor)
    }  # fmt: skip
    count = sum(layer.quantized and without_wrappers(layer.name) in plain for layer in layers)
    if not count or not torch.is_grad_enabled():
        return set()
    return {f"{count} of the quantized weights require grad. Called in grad mode: {Reason.REQUIRES_GRAD.value}."}


def _graph_breaks(graphs: list[SeenGraph], left: list[LeftFrame]) -> list[str]:
    """Where each graph ended before its function did, and which functions have none."""
    breaks = [reason for graph in graphs for reason in _graph_break(graph.rewrite)]
    known = {frame.reason for frame in left if frame.place}
    left = [frame for frame in left if frame.place or frame.reason not in known]
    return breaks + [f"{frame.place or 'the call of the model'}: not compiled: {frame.reason}" for frame in left]


def _left_notes(left: list[LeftFrame]) -> set[str]:
    """A warning where functions run in Python as a whole."""
    places = list(dict.fromkeys(frame.place or "the call of the model" for frame in left))
    if not places:
        return set()
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return {f"not compiled, but run by Python (graph_breaks says why): {'; '.join(places[:3])}{more}."}


def _graph_break(rewrite: GraphRewrite) -> list[str]:
    """Where and why a graph ended before the end of its function."""
    reason: Any = getattr(rewrite.gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return []
    frame = reason.user_stack[-1] if reason.user_stack else None
    place = f"{frame.filename}:{frame.lineno} in {frame.name}: " if frame is not None else ""
    return [place + str(reason.reason).split("\n")[0]]


def _modules(model: nn.Module, layers: list[LayerReport]) -> dict[str, str]:
    """Class names of the modules above every layer."""
    wanted = {""}
    for layer in layers:
        parts = without_wrappers(layer.name).split(".")[:-1]
        wanted |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        shown = without_wrappers(name)
        if shown in wanted:
            found[shown] = type(getattr(module, "_orig_mod", module)).__name__
    return found
