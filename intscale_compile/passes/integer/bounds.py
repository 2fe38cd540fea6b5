"""Largest magnitudes inside of the ops of an integer-only graph, from shapes and weights alone: no value can be larger.

Every input of Q16 is taken to be as large as int32 allows, since ops saturate there. What depends on a weight (the accumulator of
a linear layer, factors of a norm) comes from that weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ...kernels.integer import attention, linear, pointwise, rows
from ...kernels.integer.rows import CENTERED, GATED, highest_bit
from ...kernels.w4a8_linear import ACCUMULATE_OP
from ..base import example, is_ours

Q16 = 2**31  # magnitude of an int32 activation
SCALE = 66053  # mantissa of a token scale: (2**23 - 1) / 127, rounded
ROW = 2**15  # mantissa of a row scale, of a constant
INT64, INT32, EXACT = 63, 31, 53


@dataclass(frozen=True)
class Bound:
    """One intermediate value: the bits that its magnitude can need, and those that there are."""

    op: str
    value: str
    bits: float
    limit: int
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it fits."""
        return self.bits <= self.limit


def _bits(value: float) -> float:
    return math.log2(value) if value > 0 else 0.0


def _rows(largest: float) -> list[tuple[str, float, int]]:
    """Quantization of rows: ``2 * 127 |x| + amax``."""
    return [("127 x, doubled for rounding", _bits(255 * largest), INT64)]


def _norm(node: fx.Node) -> tuple[list[tuple[str, float, int]], float]:
    h, n = example(node.args[0]), 0
    n = int(h.shape[-1])
    x, center = 2 ** (highest_bit(n) + 1), bool(node.args[4])
    found = []
    if center:
        found.append(("sum for the mean, doubled", _bits(2 * n * Q16 * 2**CENTERED), INT64))
    found.append(("sum of squares, doubled", _bits(2 * n * x * x + n), INT64))
    found.append(("x << 15, doubled", _bits(2 * x * 2**15), INT64))
    largest = math.sqrt(n) * 2**15 * 2**14 + 2**14 + (2**45 if node.args[2] is not None else 0)
    return found, largest


def _of_norm(node: fx.Node) -> list[tuple[str, float, int]]:
    found, largest = _norm(node)
    return found + [("y * gamma (+ beta)", _bits(largest), INT64)]


def _of_norm_quantize(node: fx.Node) -> list[tuple[str, float, int]]:
    found, largest = _norm(node)
    return found + _rows(largest * _rotation(node, 5))


def _rotation(node: fx.Node, position: int) -> int:
    arguments: Any = node.args
    return max(1, int(arguments[position])) if len(arguments) > position else 1


def _of_linear(node: fx.Node) -> list[tuple[str, float, int]]:
    weight = node.meta["intscale_tensor"]
    acc = int(weight.accumulator_bound().amax())
    return [("accumulator", _bits(acc), INT32), ("acc * m * m", _bits(acc * SCALE * ROW * 1.5), INT64)]


def _of_accumulate(node: fx.Node) -> list[tuple[str, float, int]]:
    weight = node.meta["intscale_tensor"]
    return [("accumulator of this rank", _bits(int(weight.accumulator_bound().amax())), INT32)]


def _of_attention(node: fx.Node) -> list[tuple[str, float, int]]:
    arguments: Any = node.args
    q, k, c_m = example(arguments[0]), example(arguments[2]), int(arguments[8])
    keys = k.shape[2]
    longest = int(keys) if isinstance(keys, int) else 2**20
    acc = int(q.shape[-1]) * 127 * 127
    return [
        ("q . k", _bits(acc), INT32),
        ("q . k * m * m", _bits(1.5 * acc * SCALE * (SCALE * c_m >> 15)), INT64),
        (f"sum of exponentials over {longest} keys, doubled", _bits(2 * longest * 2**15), INT64),
        ("e << 14, doubled", _bits(2.0**30 + longest * 2**15), INT64),
        ("sum of p * v", _bits((2**14 + longest / 2) * 2**31), EXACT),
    ]


def _of_gate(node: fx.Node) -> list[tuple[str, float, int]]:
    return [("g * sigmoid(g)", _bits(Q16 * 2**14), INT64), ("act(g) * u", _bits(Q16 * Q16), INT64)]


GATED_LARGEST = 2.0 ** (62 - 32 + GATED)


def _of_gate_quantize(node: fx.Node) -> list[tuple[str, float, int]]:
    return _of_gate(node) + _rows(GATED_LARGEST * _rotation(node, 3))


def _of_quantize_to(node: fx.Node) -> list[tuple[str, float, int]]:
    return _rows((GATED_LARGEST if node.args[2] == GATED else Q16) * _rotation(node, 3))


def _of_activation(node: fx.Node) -> list[tuple[str, float, int]]:
    return [("x * sigmoid(x)", _bits(Q16 * 2**14), INT64), ("GELU's cube", _bits(2.0**28 * 1465), INT64)]


FORMULAS: dict[Any, Callable[[fx.Node], list[tuple[str, float, int]]]] = {
    linear.LINEAR_OP: _of_linear,
    attention.ATTENTION_OP: _of_attention,
    rows.QUANTIZE_OP: lambda node: _rows(Q16 * _rotation(node, 1)),
    rows.NORM_OP: _of_norm,
    rows.NORM_QUANTIZE_OP: _of_norm_quantize,
    rows.GATE_QUANTIZE_OP: _of_gate_quantize,
    rows.GATE_OP: _of_gate,
    rows.ACTIVATED_OP: _of_activation,
    rows.LARGEST_OP: lambda node: [],
    rows.QUANTIZE_TO_OP: _of_quantize_to,
    ACCUMULATE_OP: _of_accumulate,
    linear.EPILOGUE_OP: lambda node: [("acc * m * m", _bits(Q16 * SCALE * ROW * 1.5), INT64)],
    rows.ACTIVATION_QUANTIZE_OP: lambda node: _of_activation(node) + _rows(Q16 * _rotation(node, 2)),
    pointwise.ACTIVATION_OP: _of_activation,
    pointwise.ROPE_OP: lambda node: [("x cos + x sin", _bits(2 * Q16 * 2**15), INT64)],
    pointwise.ADD_OP: lambda node: [("sum, before it saturates", _bits(2 * Q16), INT64)],
    pointwise.EMBEDDING_OP: lambda node: [("code * m", _bits(128 * ROW), INT64)],
    pointwise.TO_FLOAT_OP: lambda node: [],
}


def bounds_of(graph: fx.Graph) -> tuple[Bound, ...]:
    """The largest bound of each value of each kind of op."""
    worst: dict[tuple[str, str], Bound] = {}
    for node in graph.nodes:
        for value, bits, limit in FORMULAS.get(node.target, lambda _: [])(node):
            name = node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]
            bound = Bound(name, value, bits, limit)
            if (name, value) not in worst or bits > worst[name, value].bits:
                worst[name, value] = bound
    return tuple(worst.values())


def count_ops(graph: fx.Graph) -> dict[str, int]:
    """How often each of our ops is called."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if is_ours(node):
            name = node.target._schema.name.partition("::")[2]
            counts[name] = counts.get(name, 0) + 1
    return counts


def table(ops: dict[str, int], bounds: Iterable[Bound]) -> list[str]:
    """Lines: each op, how often it is called, and the bits of the values in it."""
    lines = [f"{'op':<26}{'calls':>6}  {'largest value':<44}{'bits':>6} of"]
    for bound in bounds:
        flag = "" if bound.holds else "  OVERFLOWS"
        calls = ops.get(bound.op, 0)
        lines.append(f"{bound.op:<26}{calls:>6}  {bound.value:<44}{bound.bits:>6.1f} {bound.limit}{flag}")
    return lines
