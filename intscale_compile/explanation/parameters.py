"""What becomes of the parameters that are the weight of no product: looked up, added, computed with, or never reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, fx, nn

from ..integrations.torch import local_tensor
from ..passes.match import function_name
from ..passes.other_products import CONVOLUTIONS, PRODUCTS, SEVERAL_LINEARS
from ..reasons import Reason
from ..tensors.expert_layers import expert_stacks
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import is_conv1d
from .layers import eager_layer, plain_layer, unmatched_layer
from .records import LayerReport

LOOKUPS = {"embedding", "embedding_bag"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
ALL_PRODUCTS = PRODUCTS | {"linear", "bilinear", "grouped_mm", "_grouped_mm"}
BY_MODULE = (
    ((nn.Embedding, nn.EmbeddingBag), Reason.EMBEDDING),
    ((nn.modules.conv._ConvNd,), Reason.CONVOLUTION),
    ((nn.RNNBase, nn.RNNCellBase), Reason.RECURRENT),
)


class Use(NamedTuple):
    """How a graph uses a parameter: the reason that says it, and the node that does it."""

    reason: Reason
    node: fx.Node


def uses_of(graph: fx.Graph, inputs: Sequence[Any]) -> dict[int, Use]:
    """How a graph, as Dynamo made it, uses each parameter of two or more dimensions that it takes, by index of the input."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    given = dict(zip(placeholders, inputs))
    constants = {node for node, value in given.items() if isinstance(value, (nn.Parameter, nn.Buffer, IntScaleTensor))}
    constants |= {node for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        if node.all_input_nodes and all(used in constants for used in node.all_input_nodes):
            constants.add(node)
    wanted = {
        node: i for i, node in enumerate(placeholders) if node in constants and local_tensor(given[node]).dim() > 1
    }
    return {i: _use(node, constants) for node, i in wanted.items()}


def _use(parameter: fx.Node, constants: set[fx.Node]) -> Use:
    """The use that says most: of the nodes that read a parameter, or what is computed from parameters alone."""
    found = [Use(Reason.NOT_MULTIPLIED, parameter)]
    pending, seen = [parameter], {parameter}
    while pending:
        node = pending.pop()
        for user in node.users:
            reason = _reason(user)
            if reason is not None and not (reason is Reason.NOT_CONSTANT and user in constants):
                found.append(Use(reason, user))
            elif user in constants and user not in seen:
                seen.add(user)
                pending.append(user)
    return max(found, key=lambda use: IMPORTANCE.index(use.reason))


IMPORTANCE = [  # the last counts
    Reason.NOT_MULTIPLIED, Reason.EMBEDDING, Reason.RECURRENT, Reason.CONVOLUTION, Reason.ONE_OPERATOR, Reason.SUBGRAPH,
    Reason.NOT_CONSTANT,
]  # fmt: skip


def _reason(user: fx.Node) -> Optional[Reason]:
    if user.op not in ("call_function", "call_method"):
        return None
    if user.target in SEVERAL_LINEARS:
        return Reason.ONE_OPERATOR
    if isinstance(user.target, torch._ops.HigherOrderOperator):
        return Reason.SUBGRAPH
    name = function_name(user)
    kinds = (
        (LOOKUPS, Reason.EMBEDDING),
        (RECURRENT, Reason.RECURRENT),
        (CONVOLUTIONS, Reason.CONVOLUTION),
        (ALL_PRODUCTS, Reason.NOT_CONSTANT),
    )
    return next((reason for names, reason in kinds if name in names), None)


def other_parameters(model: nn.Module, seen: set[int], used: dict[int, Reason]) -> Iterator[tuple[LayerReport, Tensor]]:
    """A row for every parameter of two or more dimensions that has none yet.

    Args:
        seen: ids of the weights that have a row; those of the rows that are made are added.
        used: how the graphs use the others, by id; what is missing is in no graph.
    """
    for name, module in model.named_modules():
        stacks = expert_stacks(module)
        for leaf, parameter in module.named_parameters(name, recurse=False):
            weight = local_tensor(parameter)
            if weight.dim() < 2 or id(weight) in seen:
                continue
            seen.add(id(weight))
            if isinstance(weight, IntScaleTensor):
                yield eager_layer(leaf, weight), weight
                continue
            own = leaf.rpartition(".")[2]
            reason = used.get(id(weight)) or _absent(module, own in stacks)
            yield plain_layer(leaf, weight, reason, stacks.get(own, is_conv1d(module))), weight


COMPUTED = (Reason.NOT_CONSTANT.name, Reason.UNKNOWN_VIEW.name)
UNMATCHED = (*COMPUTED, Reason.UNKNOWN_FORM.name)  # a quantized weight runs quantized there, by its own operators


class Rows:
    """The rows of an explanation: one for each parameter, and one for each product without a parameter."""

    def __init__(self) -> None:
        self.layers: list[LayerReport] = []
        self.of_weight: dict[int, LayerReport] = {}  # by id of the weight
        self.notes: set[str] = set()
        self._places: dict[int, int] = {}

    def add(self, layer: LayerReport, weight: Optional[Tensor]) -> None:
        """Add a row, unless its weight has one; a quantized use counts more than one that is not, which becomes a note."""
        if isinstance(weight, IntScaleTensor) and layer.reason in UNMATCHED:
            layer = unmatched_layer(layer, weight)
        if weight is None:
            of_weights = set(map(id, self.of_weight.values()))
            again = (
                self._computed(layer.name) is not None
                or any((row.quantized or id(row) in of_weights) and row.name == layer.name for row in self.layers)
            )  # a product of activations, one of which a quantized layer made; or another product with a part of the weight
            if layer.reason not in COMPUTED or not again:
                self.layers.append(layer)
            return
        before, place = self.of_weight.get(id(weight)), self._computed(layer.name)
        if before is None and place is not None:
            self._places[id(weight)] = place
            self.layers[place] = self.layers[place] if not layer.quantized else layer
        elif before is None:
            self._places[id(weight)] = len(self.layers)
            self.layers.append(layer)
        elif before.quantized or not layer.quantized:
            self._note(before, layer)
            return
        else:
            self._note(layer, before)
            self.layers[self._places[id(weight)]] = layer
        self.of_weight[id(weight)] = layer

    def _computed(self, name: str) -> Optional[int]:
        """Where the row of products lies whose weight is computed from the parameter ``name``: one for all of them."""
        rows = enumerate(self.layers)
        return next((i for i, row in rows if "." in name and row.name == name and row.reason in COMPUTED), None)

    def _note(self, shown: LayerReport, other: LayerReport) -> None:
        if shown.quantized and not other.quantized:
            self.notes.add(
                f"{shown.name} is also in a product that is not quantized: {other.reason}: {other.explanation}"
            )


def _absent(module: nn.Module, in_stack: bool) -> Reason:
    """Why a weight that no graph holds is not quantized: what its module is, else that the compiler never saw it."""
    if in_stack:
        return Reason.EXPERTS
    return next((reason for kinds, reason in BY_MODULE if isinstance(module, kinds)), Reason.NOT_REACHED)


def eager_notes(model: nn.Module, layers: Sequence[LayerReport]) -> set[str]:
    """Mends for what PyTorch's own modules keep out of the graphs, and how quantized weights outside of them run."""
    notes = set()
    absent = {layer.name for layer in layers if layer.graph is None}
    eager = sum(layer.quantized for layer in layers if layer.graph is None)
    if eager:
        notes.add(
            f"{eager} quantized weight(s) are in no graph: called there, they run as W4A8 by themselves, without fusions."
        )
    kinds = {type(module) for name, module in model.named_modules() if _has_absent(name, module, absent)}
    if any(issubclass(kind, nn.RNNBase) for kind in kinds) and not torch._dynamo.config.allow_rnn:
        notes.add(
            "a function that calls nn.LSTM, nn.GRU or nn.RNN is skipped as a whole: torch._dynamo.config.allow_rnn = True lets "
            "the linear layers beside it be compiled."
        )
    attention = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    if any(issubclass(kind, attention) for kind in kinds) and torch.backends.mha.get_fastpath_enabled():
        notes.add(
            "the fast path of nn.TransformerEncoderLayer or nn.MultiheadAttention is taken: "
            "torch.backends.mha.set_fastpath_enabled(False) lets the linear layers in it be compiled."
        )
    return notes


def _has_absent(name: str, module: nn.Module, absent: set[str]) -> bool:
    return any(leaf in absent for leaf, parameter in module.named_parameters(name, recurse=True) if parameter.dim() > 1)
