"""Match: find every product of an activation with a constant weight, and say why those that stay are left alone.

Matches ``F.linear`` (so ``nn.Linear``), ``matmul`` / ``@`` / ``mm`` / ``addmm`` with the weight as right operand in
either orientation (``x @ w.t()`` or ``x @ w``, so GPT-2's ``Conv1D``), as functions, methods or operators of aten;
``inner``, ``tensordot`` and ``einsum`` where they are such a product; and all of these with a range of a weight's output rows.
Other products with a weight (``bmm``, grouped products of experts, see ``other_products``) are listed with a reason.
Emits nothing: fills ``rewrite.candidates``. Needs Dynamo's graph with fake tensors.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any, Optional

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..integrations.torch import is_dtensor, is_static_input, local_tensor, source_of, transformed_nodes
from ..reasons import OUTPUT_NAMES, SMALLEST_FEATURES, Reason, log_once
from ..tensors.expert_layers import ROUTER_CLASS, ROUTER_NAMES
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.product_forms import OTHER_FORMS
from ..tensors.selection import output_config
from .base import Candidate, GraphRewrite, Pass, argument, example, writes_to
from .other_products import PRODUCTS, other_products
from .packed_weights import WeightSource
from .respelled import respelled
from .skipped import Skipped
from .targets import ADDMM, LINEAR, MATMUL, MATMUL_METHODS
from .weight_rows import cut_of
from .weight_views import is_unknown_view, root_of_view, transposes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHER_NAMES = OTHER_FORMS | {"bmm", "einsum", "inner", "tensordot"}
VECTOR_PRODUCTS = {"mv": 0, "addmv": 1}  # the place of the matrix, which is the left operand
TRANSPOSES = {
    "t", "T", "numpy_T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "mH",
}  # fmt: skip
SELECTIONS = {"getitem", "__getitem__", "select", "index_select", "unbind", "index"}
PASS_THROUGH = {
    "to", "_to_copy", "contiguous", "detach", "float", "half", "bfloat16", "type_as", "type", "double", "clone",
}  # fmt: skip
DIMS = (("dim0", "source"), ("dim1", "destination"))
_FQN = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")


def match(rewrite: GraphRewrite) -> int:
    """Fill ``rewrite.candidates``; returns how many of them can be quantized."""
    if rewrite.candidates:
        return 0
    weights = WeightFinder(rewrite)
    grad_enabled = torch.is_grad_enabled()
    for node in rewrite.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = bool(node.args[0])
        candidate = _candidate(node, weights)
        if candidate is not None:
            candidate.reason = candidate.reason or reason_against(candidate, weights, grad_enabled)
            node.meta["intscale_grad"] = grad_enabled
            if candidate.reason is Reason.EXPERTS and "experts" in rewrite.settings.disable_passes:
                candidate.reason = Reason.PASS_DISABLED
            rewrite.candidates.append(candidate)
            if candidate.reason not in (None, Reason.EXPERTS):  # the pass for experts says what it leaves
                report(candidate)
    for candidate in list(other_products(rewrite, weights)):
        rewrite.candidates.append(candidate)
        report(candidate)
    return sum(c.reason is None for c in rewrite.candidates)


MATCH = Pass("match", match)


def report(candidate: Candidate) -> None:
    """Say once why a candidate is left alone."""
    level = logging.WARNING if candidate.reason in (Reason.REQUIRES_GRAD, Reason.NON_FINITE) else logging.INFO
    where = "at least one weight" if candidate.reason is Reason.REQUIRES_GRAD else candidate.name
    log_once(level, f"{where}: {candidate.reason.value}")  # type: ignore[union-attr]


class WeightFinder:
    """Resolves nodes to the parameters, buffers and constants of the graph."""

    def __init__(self, rewrite: GraphRewrite):
        self.rewrite = rewrite
        self.index = rewrite.input_index
        self.embeddings = {
            id(source.constant if source.index is None else rewrite.example_inputs[source.index])
            for node in rewrite.graph.nodes
            if node.target is torch.nn.functional.embedding and (source := self.source(node.args[1])) is not None
        }
        tensors = [self.tensor(s) for n in rewrite.graph.nodes if (s := self.source(n)) is not None]
        names = ["." + dotted_name(node) for node in self.index]
        self.beside_experts = {name.partition(".experts.")[0][1:] for name in names if ".experts." in name}
        self.skipped = Skipped(rewrite.settings.skip)
        self.differentiated = transformed_nodes(rewrite.graph)
        self.any_quantized = any(isinstance(t, IntScaleTensor) for t in tensors)

    def tensor(self, source: WeightSource) -> Tensor:
        """The real tensor behind a source, at compile time."""
        return source.tensor(self.rewrite.example_inputs)

    def resolve(self, node: Any, through_selection: bool = False) -> tuple[Optional[WeightSource], bool]:
        """The weight that ``node`` is, maybe transposed (last two dimensions) or cast, and whether it is transposed.

        ``through_selection`` also looks through the choice of some experts out of a stack.
        """
        transposed = False
        while isinstance(node, fx.Node):
            if any(writes_to(user, node) for user in node.users):
                return None, False  # no longer what the caller passed
            source = self.source(node)
            if source is not None:
                return source, transposed
            name = function_name(node)
            if name in TRANSPOSES and swaps_last_two(node, name):
                transposed = not transposed
            elif name not in PASS_THROUGH and not (through_selection and name in SELECTIONS):
                source, swapped = self.by_memory(node)
                return source, transposed != swapped if source is not None else False
            node = node.args[0]
        return None, False

    def by_memory(self, node: fx.Node) -> tuple[Optional[WeightSource], bool]:
        """As :meth:`resolve`, for a view that is not known by name but reads the weight, or its transpose, as a whole."""
        root = root_of_view(node)
        source, swapped = self.source(root), None if root is None else transposes(node, root)
        return (None, False) if source is None or swapped is None else (source, swapped)

    def resolve_rows(self, node: Any) -> tuple[Optional[WeightSource], bool, int]:
        """The range of a weight that ``node`` is, maybe transposed or cast: the source with the range as its rows, whether it is
        transposed, and the dimension of ``node`` along which it was cut. A source of None: it is no such thing.
        """
        flips, dim, start, end = 0, None, 0, 0
        while isinstance(node, fx.Node) and not any(writes_to(user, node) for user in node.users):
            source, transposed = self.resolve(node)
            if source is not None:
                if dim is None or self.tensor(source).dim() != 2:
                    break
                return dataclasses.replace(source, rows=(start, end)), transposed != bool(flips % 2), dim
            name = function_name(node)
            if name in TRANSPOSES and swaps_last_two(node, name):
                flips += 1
            elif name not in PASS_THROUGH:
                cut = cut_of(node, name)
                along = None if cut is None else (cut.dim + flips) % 2
                if cut is None or dim not in (None, along):
                    break
                start, end = (start + cut.start, end + cut.start) if dim is not None else (cut.start, cut.end)
                dim, node = along, cut.node
                continue
            node = node.args[0]
        return None, False, 0

    def viewed(self, node: Any) -> Optional[WeightSource]:
        """The weight of which ``node`` is a view that :meth:`resolve` does not know, or None."""
        root = root_of_view(node) if isinstance(node, fx.Node) else None
        return self.source(root) if root is not None and is_unknown_view(node, root) else None

    def source(self, node: Any) -> Optional[WeightSource]:
        """The weight that the caller passes at ``node``, or that is an attribute of the graph; None for anything else."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            value: Any = self.rewrite.gm
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            return WeightSource(str(node.target), None, value) if isinstance(value, Tensor) else None
        if node not in self.index:
            return None
        value = self.rewrite.example_inputs[self.index[node]]
        if isinstance(value, Tensor) and (
            is_static_input(node) or isinstance(value, (torch.nn.Parameter, IntScaleTensor))
        ):
            return WeightSource(dotted_name(node), self.index[node])
        return None


def dotted_name(node: fx.Node) -> str:
    """``model.layers.0.mlp.up_proj.weight`` from the source that Dynamo recorded, or the node's own name."""
    return ".".join(_FQN.findall(source_of(node))) or node.name


def function_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls, or of the attribute that it reads; empty for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr and isinstance(node.args[1], str):
        return node.args[1]
    return getattr(node.target, "__name__", "").split(".")[0]


def swaps_last_two(node: fx.Node, name: str) -> bool:
    """Whether a node that calls one of ``TRANSPOSES`` exchanges the last two dimensions and nothing else."""
    value = example(node.args[0])
    rank = value.dim() if isinstance(value, Tensor) else 2
    if name in ("t", "T", "numpy_T"):
        return rank == 2
    if name in ("mT", "mH", "adjoint"):
        return True
    dims = list(node.args[1:]) or [node.kwargs.get(first, node.kwargs.get(second)) for first, second in DIMS]
    dims = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    if not all(isinstance(d, int) for d in dims):
        return False
    dims = [d % rank for d in dims]  # type: ignore[operator]
    if name == "permute":
        return dims == [*range(rank - 2), rank - 1, rank - 2]
    return set(dims) == {rank - 2, rank - 1}


def _candidate(node: fx.Node, weights: WeightFinder) -> Optional[Candidate]:
    if node.op not in ("call_function", "call_method"):
        return None
    name = function_name(node)
    if node.kwargs.get("out") is not None and name.removeprefix("linalg_") in PRODUCTS:
        return _other_form(node, weights)
    if node.target in LINEAR:
        x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        if weights.resolve(x)[0] is not None and weights.resolve(weight)[0] is None:
            return _left_alone(node, weights, x, Reason.LEFT_OPERAND)
        return _make(node, weights, x, weight, argument(node, 2, "bias"), weight_is_nk=True)
    if node.target in MATMUL or (node.op == "call_method" and name in MATMUL_METHODS):
        left, right = argument(node, 0, "input", "self"), argument(node, 1, "other", "mat2")
        left, right = (right, left) if name == "__rmatmul__" else (left, right)
        if weights.resolve(right)[0] is not None or weights.resolve_rows(right)[0] is not None:
            return _make(node, weights, left, right, None, weight_is_nk=False)
        return _left_alone(node, weights, left, Reason.LEFT_OPERAND)
    if node.target in ADDMM or (node.op == "call_method" and name == "addmm"):
        return _addmm(node, weights)
    if name in VECTOR_PRODUCTS:
        return _left_alone(node, weights, argument(node, VECTOR_PRODUCTS[name], "input", "mat"), Reason.LEFT_OPERAND)
    for x, weight, weight_is_nk in respelled(node, name):
        if (made := _of_matrix(node, weights, x, weight, weight_is_nk)) is not None:
            return made
    return _other_form(node, weights) if name.removeprefix("linalg_") in OTHER_NAMES or "grouped_mm" in name else None


def _other_form(node: fx.Node, weights: WeightFinder) -> Optional[Candidate]:
    """A product that no pass knows, with the first weight that it takes."""
    found = next((n for n in node.all_input_nodes if weights.resolve(n, through_selection=True)[0] is not None), None)
    return _left_alone(node, weights, found, Reason.UNKNOWN_FORM)


def _of_matrix(node: fx.Node, weights: WeightFinder, x: Any, weight: Any, weight_is_nk: bool) -> Optional[Candidate]:
    """The candidate of a product with a weight that is a matrix, or a range of its rows; else None."""
    source = weights.resolve(weight)[0] or weights.resolve_rows(weight)[0]
    if source is None or weights.tensor(source).dim() != 2:
        return None
    return _make(node, weights, x, weight, None, weight_is_nk)


def _left_alone(node: fx.Node, weights: WeightFinder, weight: Any, reason: Reason) -> Optional[Candidate]:
    """A product that stays as it is, if ``weight`` is a weight at all."""
    source, transposed = weights.resolve(weight, through_selection=True)
    if source is None:
        return None
    shape = tuple(weights.tensor(source).shape)
    if len(shape) == 3 and (reason is not Reason.UNKNOWN_FORM or is_grouped(node) or holds_experts(node, source.name)):
        reason = Reason.EXPERTS  # until the pass for experts has looked at it
    elif len(shape) < 2:
        return None
    return Candidate(node, source.name, None, weight, None, source, transposed, shape[-2:], reason)  # type: ignore[arg-type]


def is_grouped(node: fx.Node) -> bool:
    """Whether a product is of a form that the pass for experts knows: batched or grouped."""
    name = function_name(node)
    return name in ("bmm", "matmul") or node.target in MATMUL or "grouped_mm" in name


def holds_experts(node: fx.Node, weight: str) -> bool:
    """Whether a stack of matrices is one of experts, by its name and the modules that the product is in."""
    stack = node.meta.get("nn_module_stack") or {}
    classes = [getattr(kind, "__name__", str(kind)) for _, kind in stack.values()]
    return "grouped_mm" in function_name(node) or any("expert" in text.lower() for text in (weight, *classes[-2:]))


def _make(node: fx.Node, weights: WeightFinder, x: Any, weight: Any, bias: Any, weight_is_nk: bool) -> Candidate:
    source, transposed = weights.resolve(weight)
    if source is None:
        source, transposed, along = weights.resolve_rows(weight)
        source = source if along == (0 if weight_is_nk else 1) else None  # not along the input features
    if source is None:
        expert = _left_alone(node, weights, weight, Reason.NOT_CONSTANT)
        viewed = weights.viewed(weight)
        reason = Reason.NOT_CONSTANT if viewed is None else Reason.UNKNOWN_VIEW
        name = node.name if viewed is None else viewed.name
        return expert or Candidate(node, name, x, weight, bias, None, False, None, reason, tokens=tokens_of(x))
    tensor = weights.tensor(source)
    kept_kn = transposed if weight_is_nk else not transposed
    if tensor.dim() != 2:
        reason = Reason.EXPERTS if tensor.dim() == 3 else Reason.WEIGHT_RANK
        return Candidate(node, source.name, x, weight, bias, source, kept_kn, None, reason, tokens=tokens_of(x))
    n, k = reversed(tensor.shape) if kept_kn else tensor.shape
    n = n if source.rows is None else source.rows[1] - source.rows[0]
    return Candidate(node, source.name, x, weight, bias, source, kept_kn, (n, k), tokens=tokens_of(x))


def _addmm(node: fx.Node, weights: WeightFinder) -> Optional[Candidate]:
    bias, x, weight = argument(node, 0, "input", "self"), argument(node, 1, "mat1"), argument(node, 2, "mat2")
    if weights.resolve(weight)[0] is None and weights.resolve_rows(weight)[0] is None:
        return _left_alone(node, weights, x, Reason.LEFT_OPERAND)
    candidate = _make(node, weights, x, weight, bias, weight_is_nk=False)
    shape = candidate.shape
    value = example(bias)
    if argument(node, 3, "beta") not in (None, 1) or argument(node, 4, "alpha") not in (None, 1):
        candidate.reason = Reason.SCALED_ADDMM
    elif shape is not None and (not isinstance(value, Tensor) or tuple(value.shape) != (shape[0],)):
        candidate.reason = Reason.BIAS_SHAPE
    return candidate


def tokens_of(x: Any) -> str:
    """Rows of an activation: a number, or a symbol's text."""
    value = example(x)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return "?"
    count = 1
    for size in value.shape[:-1]:
        count = count * size
    return str(count)


def reason_against(candidate: Candidate, weights: WeightFinder, grad_enabled: bool) -> Optional[Reason]:
    """Why a product that could be quantized is not, or None."""
    assert candidate.source is not None and candidate.shape is not None
    tensor, settings = weights.tensor(candidate.source), weights.rewrite.settings
    x, used = example(candidate.x), example(candidate.weight)
    if isinstance(x, Tensor) and x.dtype not in FLOATS:
        return Reason.ACTIVATION_DTYPE
    if isinstance(used, Tensor) and used.device != tensor.device:  # moved inside the graph, as offloading does
        return Reason.DEVICE
    if weights.skipped(candidate.name, tensor):
        return Reason.EXCLUDED
    if "insert_qdq" in settings.disable_passes:
        return Reason.PASS_DISABLED
    if candidate.node in weights.differentiated:
        return Reason.DIFFERENTIATED
    if isinstance(tensor, IntScaleTensor):
        # The product must reduce over the dimension that was quantized.
        return None if tensor.transposed == candidate.transposed else Reason.UNKNOWN_FORM
    return _plain_reason(candidate, tensor, weights, grad_enabled)


def _plain_reason(candidate: Candidate, tensor: Tensor, weights: WeightFinder, grad_enabled: bool) -> Optional[Reason]:
    quantize_plain = weights.rewrite.settings.quantize_plain
    if isinstance(tensor, FakeTensor):
        return Reason.FAKE_WEIGHT
    if is_dtensor(tensor):
        return Reason.SHARDED_FORM if isinstance(local_tensor(tensor), IntScaleTensor) else Reason.SHARDED_PLAIN
    if type(tensor) not in (torch.nn.Parameter, Tensor, torch.nn.Buffer):
        return Reason.FOREIGN_SUBCLASS
    default = _default_reason(candidate, tensor, weights)
    candidate.config = output_config(weights.rewrite.settings.config, default)
    if default is not None and candidate.config is None and not (default is Reason.RAW_PARAMETER and quantize_plain):
        return default
    if tensor.dtype not in FLOATS:
        return Reason.WEIGHT_DTYPE
    if tensor.device.type not in ("cpu", "cuda"):
        return Reason.DEVICE
    if min(tensor.shape[-2:]) < SMALLEST_FEATURES:  # of the whole weight, as quantize decides; a stack has few experts
        return Reason.TOO_SMALL
    choice = weights.rewrite.models.choice(tensor)
    decided = weights.any_quantized or (choice is not None and choice.decided)
    # The option names an output embedding, whatever was decided of the model before.
    if quantize_plain is False or (quantize_plain is None and decided and candidate.config is None):
        return Reason.NOT_SELECTED
    if tensor.requires_grad and grad_enabled:
        return Reason.REQUIRES_GRAD
    return None


def _default_reason(candidate: Candidate, tensor: Tensor, weights: WeightFinder) -> Optional[Reason]:
    """Why a weight is left alone unless it is named: what ``quantize`` decides for its model, as far as the model is known."""
    models = weights.rewrite.models
    if id(tensor) in weights.embeddings:
        return Reason.TIED_EMBEDDING
    if (choice := models.choice(tensor)) is not None:
        return choice.reason
    if any(candidate.name.endswith(f".{name}.weight") for name in OUTPUT_NAMES):
        return Reason.OUTPUT_EMBEDDING
    if _routes(candidate, weights):
        return Reason.ROUTER
    return Reason.RAW_PARAMETER if models.known else None


def _routes(candidate: Candidate, weights: WeightFinder) -> bool:
    """Whether a product decides which experts a token sees: inside a router, or the ``gate`` beside ``experts``."""
    module, _, leaf = candidate.name.rpartition(".")[0].rpartition(".")
    if leaf in ROUTER_NAMES and module in weights.beside_experts:
        return True
    stack = candidate.node.meta.get("nn_module_stack") or {}
    classes = [getattr(kind, "__name__", str(kind).rpartition(".")[2]) for _, kind in stack.values()]
    return any(ROUTER_CLASS.search(name) for name in classes)
