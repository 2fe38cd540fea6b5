"""Integer gates: ``act(gate) * up`` and ``act(x)``, with the quantization behind them.

    quantize_per_token(silu(g) * u)  =>  int_gate_quantize(g, u)
    quantize_per_token(gelu(x))      =>  int_activation_quantize(x);  other readers get int_activation(x)

Matches SiLU and GELU (both forms give the same integers).
"""

from __future__ import annotations

from typing import Any, Optional

from torch import fx

from ...kernels.integer.pointwise import ACTIVATION_OP
from ...kernels.integer.rows import ACTIVATION_QUANTIZE_OP, GATE_QUANTIZE_OP
from ..base import GraphRewrite, Pass, example, writes_in_place
from .nodes import codes_for_readers, either, emitter, erase_unread, is_float, name_of

KINDS = {"silu": "silu", "gelu": "gelu"}


def integer_gates(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        gate = either(node, "mul", gated) if is_float(example(node)) else None
        if gate is not None:
            done += codes_for_readers(rewrite, node, emitter(rewrite, GATE_QUANTIZE_OP, gate, node))
            erase_unread(node)
    for node in list(rewrite.graph.nodes):
        kind = kind_of(node)
        if kind is not None:
            _activation(rewrite, node, kind)
            done += 1
    return done


INTEGER_GATES = Pass("integer_gates", integer_gates)


def kind_of(node: Any) -> Optional[str]:
    """Which activation a node applies, or None."""
    kind = KINDS.get(name_of(node))
    return None if kind is None or writes_in_place(node) or not is_float(example(node)) else kind


def gated(act: Any, up: Any) -> Optional[tuple[fx.Node, fx.Node, str]]:
    """``(gate, up, activation)`` of the operands of ``act(gate) * up``, or None."""
    kind = kind_of(act)
    alike = kind is not None and isinstance(up, fx.Node) and is_float(example(up))
    return (act.args[0], up, kind) if alike and example(up).shape == example(act).shape else None  # type: ignore[return-value]


def _activation(rewrite: GraphRewrite, node: fx.Node, kind: str) -> None:
    x = node.args[0]
    codes_for_readers(rewrite, node, emitter(rewrite, ACTIVATION_QUANTIZE_OP, (x, kind), node))
    if node.users:
        with rewrite.graph.inserting_before(node):
            made = rewrite.call(ACTIVATION_OP, (x, kind), like=node)
        node.replace_all_uses_with(made)
    erase_unread(node)
