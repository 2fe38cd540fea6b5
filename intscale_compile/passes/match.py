"""Match: find every product of an activation with a constant weight, and say why those that stay are left alone.

Matches ``F.linear`` (so ``nn.Linear``), ``matmul`` / ``@`` / ``mm`` / ``addmm`` with the weight as right operand in
either orientation (``x @ w.t()`` or ``x @ w``, so GPT-2's ``Conv1D``), as functions or methods. Other products with a weight
(``bmm``, grouped products of experts, ``einsum``) are listed with a reason.
Emits nothing: fills ``rewrite.candidates``. Needs Dynamo's graph with fake tensors.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..packed_weights import WeightSource
from ..quantize import LEFT_OUT
from ..reasons import OUTPUT_NAMES, SMALLEST_FEATURES, Reason, log_once
from ..tensor import IntScaleTensor
from .base import Candidate, GraphRewrite, Pass, example, writes_in_place

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LINEAR = {torch.nn.functional.linear, torch._C._nn.linear}
MATMUL = {torch.matmul, torch.mm, operator.matmul}
MATMUL_METHODS = {"matmul", "mm", "__matmul__"}
OTHER_PRODUCTS = {torch.bmm, torch.baddbmm, torch.einsum, torch.tensordot, torch.inner, torch.nn.functional.bilinear}
OTHER_NAMES = {"bmm", "baddbmm", "einsum", "inner", "tensordot"}
TRANSPOSES = {"t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims"}
SELECTIONS = {"getitem", "__getitem__", "select", "index_select", "unbind"}
PASS_THROUGH = {"to", "contiguous", "detach", "float", "half", "bfloat16", "type_as", "clone"}
_FQN = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")


def match(rewrite: GraphRewrite) -> int:
    """Fill ``rewrite.candidates``; returns how many of them can be quantized."""
    if rewrite.candidates:
        return 0
    weights = _WeightFinder(rewrite)
    grad_enabled = torch.is_grad_enabled()
    for node in rewrite.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = bool(node.args[0])
        candidate = _candidate(node, weights)
        if candidate is not None:
            candidate.reason = candidate.reason or _reason(candidate, weights, grad_enabled)
            node.meta["intscale_grad"] = grad_enabled
            rewrite.candidates.append(candidate)
            if candidate.reason is not None:
                _report(candidate)
    for candidate in _in_subgraphs(rewrite):
        rewrite.candidates.append(candidate)
        _report(candidate)
    return sum(c.reason is None for c in rewrite.candidates)


MATCH = Pass("match", match)


def _report(candidate: Candidate) -> None:
    level = logging.WARNING if candidate.reason in (Reason.REQUIRES_GRAD, Reason.NON_FINITE) else logging.INFO
    where = "at least one weight" if candidate.reason is Reason.REQUIRES_GRAD else candidate.name
    log_once(level, f"{where}: {candidate.reason.value}")  # type: ignore[union-attr]


def _in_subgraphs(rewrite: GraphRewrite) -> Iterator[Candidate]:
    """Linears in the bodies of higher-order operators, which take their weights as arguments."""
    for name, module in rewrite.gm.named_modules():
        if name and isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.target in LINEAR:
                    x, weight = _arg(node, 0, "input"), _arg(node, 1, "weight")
                    yield Candidate(node, f"{name}.{node.name}", x, weight, None, None, False, None, Reason.SUBGRAPH)


class _WeightFinder:
    """Resolves nodes to the parameters, buffers and constants of the graph."""

    def __init__(self, rewrite: GraphRewrite):
        self.rewrite = rewrite
        self.index = {node: i for i, node in enumerate(rewrite.placeholders())}
        self.embeddings = {
            id(source.constant if source.index is None else rewrite.example_inputs[source.index])
            for node in rewrite.graph.nodes
            if node.target is torch.nn.functional.embedding and (source := self._source(node.args[1])) is not None
        }
        tensors = [self.tensor(s) for n in rewrite.graph.nodes if (s := self._source(n)) is not None]
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
            if any(writes_in_place(user) for user in node.users):
                return None, False  # no longer what the caller passed
            source = self._source(node)
            if source is not None:
                return source, transposed
            name = _function_name(node)
            if name in TRANSPOSES and _swaps_last_two(node, name):
                transposed = not transposed
            elif name not in PASS_THROUGH and not (through_selection and name in SELECTIONS):
                return None, False
            node = node.args[0]
        return None, False

    def _source(self, node: Any) -> Optional[WeightSource]:
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
        static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
        if isinstance(value, Tensor) and (static or isinstance(value, (torch.nn.Parameter, IntScaleTensor))):
            return WeightSource(_dotted_name(node), self.index[node])
        return None


def _dotted_name(node: fx.Node) -> str:
    """``model.layers.0.mlp.up_proj.weight`` from the source that Dynamo recorded, or the node's own name."""
    source = getattr(node, "_dynamo_source", None)
    text = getattr(source, "name", "")
    text = text() if callable(text) else text
    return ".".join(_FQN.findall(text)) or node.name


def _function_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr and isinstance(node.args[1], str):
        return node.args[1]
    return getattr(node.target, "__name__", "").split(".")[0]


def _swaps_last_two(node: fx.Node, name: str) -> bool:
    value = example(node.args[0])
    rank = value.dim() if isinstance(value, Tensor) else 2
    if name in ("t", "T"):
        return rank == 2
    if name == "mT":
        return True
    dims = [a for a in node.args[1:]] or [node.kwargs.get("dim0"), node.kwargs.get("dim1")]
    dims = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    if not all(isinstance(d, int) for d in dims):
        return False
    dims = [d % rank for d in dims]  # type: ignore[operator]
    if name == "permute":
        return dims == [*range(rank - 2), rank - 1, rank - 2]
    return set(dims) == {rank - 2, rank - 1}


def _arg(node: fx.Node, position: int, *names: str) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _candidate(node: fx.Node, weights: _WeightFinder) -> Optional[Candidate]:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in LINEAR:
        x, weight = _arg(node, 0, "input"), _arg(node, 1, "weight")
        return _make(node, weights, x, weight, _arg(node, 2, "bias"), weight_is_nk=True)
    name = _function_name(node)
    if node.target in MATMUL or (node.op == "call_method" and name in MATMUL_METHODS):
        left, right = _arg(node, 0, "input"), _arg(node, 1, "other", "mat2")
        if weights.resolve(right)[0] is not None:
            return _make(node, weights, left, right, None, weight_is_nk=False)
        return _left_alone(node, weights, left, Reason.LEFT_OPERAND)
    if node.target is torch.addmm or (node.op == "call_method" and name == "addmm"):
        return _addmm(node, weights)
    if node.target in OTHER_PRODUCTS or name in OTHER_NAMES or "grouped_mm" in name:
        found = next(
            (n for n in node.all_input_nodes if weights.resolve(n, through_selection=True)[0] is not None), None
        )
        return _left_alone(node, weights, found, Reason.UNKNOWN_FORM)
    return None


def _left_alone(node: fx.Node, weights: _WeightFinder, weight: Any, reason: Reason) -> Optional[Candidate]:
    """A product that stays as it is, if ``weight`` is a weight at all."""
    source, transposed = weights.resolve(weight, through_selection=True)
    if source is None:
        return None
    shape = tuple(weights.tensor(source).shape)
    if len(shape) == 3:
        reason = Reason.EXPERTS
    elif len(shape) < 2:
        return None
    return Candidate(node, source.name, None, weight, None, source, transposed, shape[-2:], reason)  # type: ignore[arg-type]


def _make(node: fx.Node, weights: _WeightFinder, x: Any, weight: Any, bias: Any, weight_is_nk: bool) -> Candidate:
    source, transposed = weights.resolve(weight)
    if source is None:
        expert = _left_alone(node, weights, weight, Reason.NOT_CONSTANT)
        return expert or Candidate(
            node, node.name, x, weight, bias, None, False, None, Reason.NOT_CONSTANT, tokens=_tokens(x)
        )
    tensor = weights.tensor(source)
    kept_kn = transposed if weight_is_nk else not transposed
    if tensor.dim() != 2:
        reason = Reason.EXPERTS if tensor.dim() == 3 else Reason.WEIGHT_RANK
        return Candidate(node, source.name, x, weight, bias, source, kept_kn, None, reason, tokens=_tokens(x))
    n, k = reversed(tensor.shape) if kept_kn else tensor.shape
    return Candidate(node, source.name, x, weight, bias, source, kept_kn, (n, k), tokens=_tokens(x))


def _addmm(node: fx.Node, weights: _WeightFinder) -> Optional[Candidate]:
    bias, x, weight = _arg(node, 0, "input"), _arg(node, 1, "mat1"), _arg(node, 2, "mat2")
    if weights.resolve(weight)[0] is None:
        return _left_alone(node, weights, x, Reason.LEFT_OPERAND)
    candidate = _make(node, weights, x, weight, bias, weight_is_nk=False)
    shape = candidate.shape
    value = example(bias)
    if _arg(node, 3, "beta") not in (None, 1) or _arg(node, 4, "alpha") not in (None, 1):
        candidate.reason = Reason.SCALED_ADDMM
    elif shape is not None and (not isinstance(value, Tensor) or tuple(value.shape) != (shape[0],)):
        candidate.reason = Reason.BIAS_SHAPE
    return candidate


def _tokens(x: Any) -> str:
    value = example(x)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return "?"
    count = 1
    for size in value.shape[:-1]:
        count = count * size
    return str(count)


def _reason(candidate: Candidate, weights: _WeightFinder, grad_enabled: bool) -> Optional[Reason]:
    """Why a product that could be quantized is not, or None."""
    assert candidate.source is not None and candidate.shape is not None
    tensor, settings = weights.tensor(candidate.source), weights.rewrite.settings
    x, used = example(candidate.x), example(candidate.weight)
    if isinstance(x, Tensor) and x.dtype not in FLOATS:
        return Reason.ACTIVATION_DTYPE
    if isinstance(used, Tensor) and used.device != tensor.device:  # moved inside the graph, as offloading does
        return Reason.DEVICE
    if any(re.fullmatch(pattern, candidate.name) for pattern in settings.skip):
        return Reason.EXCLUDED
    if isinstance(tensor, IntScaleTensor):
        # The product must reduce over the dimension that was quantized.
        return None if tensor.transposed == candidate.transposed else Reason.UNKNOWN_FORM
    return _plain_reason(candidate, tensor, weights, grad_enabled)


def _plain_reason(candidate: Candidate, tensor: Tensor, weights: _WeightFinder, grad_enabled: bool) -> Optional[Reason]:
    quantize_plain = weights.rewrite.settings.quantize_plain
    if isinstance(tensor, FakeTensor):
        return Reason.FAKE_WEIGHT
    if type(tensor) not in (torch.nn.Parameter, Tensor, torch.nn.Buffer):
        return Reason.FOREIGN_SUBCLASS
    if id(tensor) in weights.embeddings:
        return Reason.TIED_EMBEDDING
    if candidate.name.split(".")[-2:-1] and candidate.name.split(".")[-2] in OUTPUT_NAMES:
        return Reason.OUTPUT_EMBEDDING
    if "Router" in _module_class(candidate.node):
        return Reason.ROUTER
    if tensor.dtype not in FLOATS:
        return Reason.WEIGHT_DTYPE
    if tensor.device.type not in ("cpu", "cuda"):
        return Reason.DEVICE
    if min(candidate.shape) < SMALLEST_FEATURES:  # type: ignore[type-var, arg-type]
        return Reason.TOO_SMALL
    if quantize_plain is False or (quantize_plain is None and (weights.any_quantized or is_left_out(tensor))):
        return Reason.NOT_SELECTED
    if tensor.requires_grad and grad_enabled:
        return Reason.REQUIRES_GRAD
    return None


def is_left_out(tensor: Tensor) -> bool:
    """Whether ``quantize_`` ran over the model of this weight and did not select it."""
    return getattr(tensor, LEFT_OUT, False)


def _module_class(node: fx.Node) -> str:
    """Class name of the innermost module that the node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return getattr(entries[-1][1], "__name__", str(entries[-1][1])) if entries else ""
