"""Gated activation: ``act(gate) * up`` moves into the GEMM of a gate and an up projection.

    y = w4a8_linear(..., out_features = 2 I);  gate, up = split(y, [I, I]);  act(gate) * up
    =>  w4a8_gated_linear(..., act)

Matches merged projections and fused ones (Phi-3), halves made by ``split``, ``chunk`` or slices, SiLU and both forms of
GELU, and either order of the product. The gate must be the first half, and nothing else may read what disappears. Left
alone: halves that are not whole tiles of 64 rows, graphs that autograd watches, few tokens, products whose strides are not
those of a new tensor and may be looked at (:mod:`.layout`), tensors that are not on a GPU (unless
``intscale.force_passes`` names this pass).
"""

from __future__ import annotations

import math
import operator
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ..kernels.arguments import GatedArguments, LinearArguments, arguments_of, converted
from ..kernels.w4a8_gated import GATED_OP
from ..kernels.w4a8_linear import LINEAR_OP
from .base import GraphRewrite, Pass, example, writes_in_place
from .layout import take, values_if_contiguous
from .match import function_name

# Below, half the output is nothing, and Inductor makes SiLU * mul and the quantization behind it one small kernel. At 2048
# tokens of Llama-3-8B that kernel took 91 us behind a GEMM of 355 us (H100).
LEAST_TOKENS = 256

# Without CUDA graphs the host pays for the call of the op what `kernels.template.GLUON_TOKENS` says, up to 192 us. An
# estimate from that, not a measurement: a layer of Llama-3-8B keeps an H100 busy for longer from about 1024 tokens on.
LEAST_TOKENS_WITHOUT_GRAPHS = 1024

TILE_ROWS = 64
SILU = {torch.nn.functional.silu, torch.ops.aten.silu.default}
GELU = {torch.nn.functional.gelu, torch._C._nn.gelu}
PRODUCT = {operator.mul, torch.mul, "mul"}
SPLIT = {"split", "chunk", "tensor_split"}


def gated_activation(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        match = _match(node) if node.target in PRODUCT else None
        values = values_if_contiguous(rewrite, node) if match and _worthwhile(rewrite, match[0]) else None
        if match is not None and values is not None:
            take(rewrite, node, values)
            _replace(rewrite, node, *match)
            done += 1
    return done


GATED_ACTIVATION = Pass("gated_activation", gated_activation)


def _match(product: fx.Node) -> Optional[tuple[fx.Node, str]]:
    """The linear behind ``act(gate) * up`` and the activation's name, or None."""
    if len(product.args) != 2 or product.kwargs:
        return None
    for act, up in (product.args, product.args[::-1]):
        name = _activation(act)
        gate = act.args[0] if name else None  # type: ignore[union-attr]
        linear = _linear(gate, up) if isinstance(gate, fx.Node) and isinstance(up, fx.Node) else None
        if name is None or linear is None or example(product) is None:
            continue
        read_once = list(gate.users) == [act] and list(up.users) == list(act.users) == [product]  # type: ignore[union-attr]
        if read_once and example(product).dtype == example(linear).dtype and unwatched(linear):
            return linear, name
    return None


def _activation(node: Any) -> Optional[str]:
    if not isinstance(node, fx.Node) or writes_in_place(node):
        return None
    if node.target in SILU:
        return "silu"
    if node.target in GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return None


def _linear(gate: fx.Node, up: fx.Node) -> Optional[fx.Node]:
    """The linear whose first half of outputs is ``gate`` and whose second is ``up``, if they alone read it."""
    linear, readers = _halved(gate, 0)
    other, more = _halved(up, 1)
    if linear is None or linear is not other or set(linear.users) != readers | more:
        return None
    pieces = {user for reader in readers | more for user in (reader.users if reader not in (gate, up) else ())}
    return linear if pieces <= {gate, up} else None


def _halved(piece: fx.Node, half: int) -> tuple[Optional[fx.Node], set[fx.Node]]:
    """The linear that ``piece`` is the given half of, and the node that reads it; None where it is something else."""
    if piece.target is not operator.getitem or not isinstance(piece.args[0], fx.Node):
        return None, set()
    source: Any = piece.args[0]
    index: Any = piece.args[1]
    if function_name(source) in SPLIT:
        linear, pieces = source.args[0], example(source)
        equal = isinstance(pieces, (tuple, list)) and len(pieces) == 2 and isinstance(index, int) and index % 2 == half
        found = equal and _is_linear(linear) and all(p.shape[-1] * 2 == _rows(linear) for p in pieces)
        return (linear if found else None), {source}
    found = _is_linear(source) and _takes_half(index, half, _rows(source))
    return (source if found else None), {piece}


def _rows(linear: fx.Node) -> int:
    """Output features of a fused linear."""
    return arguments_of(LinearArguments, linear).out_features


def _is_linear(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is LINEAR_OP and "intscale_tensor" in node.meta


def _takes_half(index: Any, half: int, features: int) -> bool:
    """Whether ``index`` is ``[..., :features / 2]`` or ``[..., features / 2:]``."""
    if not isinstance(index, tuple) or not isinstance(index[-1], slice) or index[-1].step not in (None, 1):
        return False
    whole = all(i is Ellipsis or i == slice(None) for i in index[:-1])
    start, stop = index[-1].start or 0, features if index[-1].stop is None else index[-1].stop
    return whole and (start, stop) == (half * features // 2, (half + 1) * features // 2)


def unwatched(linear: fx.Node) -> bool:
    """Whether no gradient will flow through the linear: the ops that it becomes a part of have none."""
    arguments = arguments_of(LinearArguments, linear)
    bias = example(arguments.bias)
    trains = isinstance(bias, Tensor) and bias.requires_grad and linear.meta["intscale_grad"]
    return arguments.ste_input is None and not trains


def tokens_hint(value: Any) -> Optional[int]:
    """Rows of an activation; of a symbol the number that it had, None where that is not known."""
    # `Size.numel` makes a number of a symbolic size, and a graph of its own for each.
    tokens = math.prod(value.shape[:-1])
    return tokens if isinstance(tokens, int) else tokens.node.hint


def _worthwhile(rewrite: GraphRewrite, linear: fx.Node) -> bool:
    value = example(linear)
    forced = "gated_activation" in rewrite.settings.force_passes
    if _rows(linear) % (2 * TILE_ROWS) or not forced and value.device.type != "cuda":
        return False
    hint = tokens_hint(value)
    least = LEAST_TOKENS if forced or rewrite.cuda_graphs else LEAST_TOKENS_WITHOUT_GRAPHS
    return hint is not None and hint >= least


def _replace(rewrite: GraphRewrite, product: fx.Node, linear: fx.Node, activation: str) -> None:
    arguments = converted(GatedArguments, arguments_of(LinearArguments, linear), activation=activation)
    with rewrite.graph.inserting_before(linear):
        gated = rewrite.call(GATED_OP, tuple(arguments), like=linear)
    for key in ("intscale_candidates", "intscale_grad", "intscale_tensor"):
        gated.meta[key] = linear.meta[key]
    product.replace_all_uses_with(gated)
    _erase(rewrite, product, linear)


def _erase(rewrite: GraphRewrite, node: fx.Node, last: fx.Node) -> None:
    """Erase ``node`` and what only it read, back to ``last``."""
    sources = node.all_input_nodes
    rewrite.graph.erase_node(node)
    for source in sources if node is not last else ():
        if not source.users:
            _erase(rewrite, source, last)
