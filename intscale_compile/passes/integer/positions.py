"""Integer positions: rotary position embedding becomes ``int_rope`` with a table of cosines and sines.

    emb = cat((f, f)),  f = positions * inv_freq;  x * cos(emb) + cat((-x2, x1)) * sin(emb)  =>  int_rope(x, positions, table)

Matches halves that are rotated (Llama, Mistral, Qwen), constant frequencies and scalings, positions of shape ``[1 or B, T]``.
Left alone: partial and interleaved rotations, frequencies that depend on the length of the sequence. The table has
``intscale.positions`` rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from torch import Tensor, fx

from ...errors import ConfigError
from ...kernels.integer.pointwise import ROPE_OP
from ..base import GraphRewrite, Pass, example
from .nodes import binary, either, erase_unread, is_float, name_of, number
from .parts import part_input, source_of

_MOVES = {"unsqueeze", "getitem", "expand", "transpose", "view", "reshape", "float", "to", "contiguous"}


class _Turn(NamedTuple):
    """``function(angles) * scaling``, the angles being positions times frequencies."""

    function: str
    scaling: float
    emb: fx.Node


def integer_positions(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        found = either(node, "add", _rotated) if is_float(example(node)) else None
        angles = _angles(rewrite, found[1].emb) if found is not None else None
        if found is not None and angles is not None:
            _replace(rewrite, node, found[0], found[1], *angles)
            done += 1
    return done


INTEGER_POSITIONS = Pass("integer_positions", integer_positions)


def _rotated(straight: Any, turned: Any) -> Optional[tuple[fx.Node, _Turn]]:
    """``(x, cosine)`` of ``x * cos`` and ``rotate_half(x) * sin``."""
    first = either(straight, "mul", lambda x, c: _with_turn(x, c, "cos"))
    second = either(turned, "mul", lambda x, s: _with_turn(x, s, "sin"))
    if first is None or second is None or first[1][1:] != second[1][1:]:
        return None
    return first if _is_rotation(second[0], first[0]) else None


def _with_turn(x: Any, factor: Any, function: str) -> Optional[tuple[Any, _Turn]]:
    turn = _turn(factor)
    return (x, turn) if turn is not None and turn.function == function and turn.emb is not x else None


def _turn(node: Any) -> Optional[_Turn]:
    scaling = 1.0
    while isinstance(node, fx.Node):
        name = name_of(node)
        if name in ("cos", "sin"):
            return _Turn(name, scaling, node.args[0])  # type: ignore[arg-type]
        factor = next((n for n in map(number, binary(node, "mul") or ()) if n is not None), None)
        if factor is not None:
            scaling *= factor
        elif name not in ("unsqueeze", "contiguous") or (name == "unsqueeze" and node.args[1:] != (1,)):
            return None
        node = node.args[0]
    return None


def _is_rotation(node: Any, x: fx.Node) -> bool:
    """Whether ``node`` is ``cat((-x[..., D / 2:], x[..., :D / 2]), -1)``."""
    if name_of(node) != "cat" or not isinstance(node.args[0], (tuple, list)) or len(node.args[0]) != 2:
        return False
    features = example(x).shape[-1]
    negated, first = node.args[0]
    second = negated.args[0] if name_of(negated) == "neg" else None
    return (
        _is_slice(first, x, (None, 0), (features // 2,))
        and _is_slice(second, x, (features // 2,), (None, features))
        and (node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0) in (-1, example(x).dim() - 1))
    )


def _is_slice(node: Any, x: fx.Node, starts: tuple, stops: tuple) -> bool:
    if name_of(node) != "getitem" or node.args[0] is not x or not isinstance(node.args[1], tuple):
        return False
    *lead, last = node.args[1]
    whole = all(i is Ellipsis or i == slice(None) for i in lead) and isinstance(last, slice)
    return whole and last.step in (None, 1) and last.start in starts and last.stop in stops


def _angles(rewrite: GraphRewrite, emb: Any) -> Optional[tuple[Any, fx.Node]]:
    """``(frequencies, positions)`` behind ``cat((f, f), -1)`` where f is their product, or None."""
    halves = emb.args[0] if name_of(emb) == "cat" else None
    if not isinstance(halves, (tuple, list)) or len(halves) != 2 or halves[0] is not halves[1]:
        return None
    node = halves[0]
    while name_of(node) in ("transpose", "contiguous"):
        node = node.args[0]
    if name_of(node) not in ("mul", "matmul", "bmm"):
        return None
    leaves = [_leaf(rewrite, operand) for operand in node.args[:2]]
    sources = [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, fx.Node)]
    positions = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    return (sources[0], positions[0]) if len(sources) == len(positions) == 1 else None


def _leaf(rewrite: GraphRewrite, node: Any) -> Any:
    """The constant frequencies, or the positions of two dimensions, that ``node`` is a view of; None for anything else."""
    while isinstance(node, fx.Node):
        source = source_of(rewrite, node)
        value = example(node)
        if source is not None:
            return source if isinstance(value, Tensor) and value.dim() == 1 and is_float(value) else None
        if isinstance(value, Tensor) and not is_float(value) and value.dim() == 2:
            return node
        if name_of(node) not in _MOVES:
            return None
        node = node.args[0]
    return None


def _replace(rewrite: GraphRewrite, node: fx.Node, x: fx.Node, turn: _Turn, inv_freq: Any, positions: fx.Node) -> None:
    length, tokens = rewrite.settings.positions, example(x).shape[2]
    if isinstance(tokens, int) and tokens > length:
        raise ConfigError(
            f"a sequence of {tokens} tokens is longer than the table of positions: set the option intscale.positions, "
            f"which is {length}."
        )
    table = part_input(rewrite, "rope_table", (inv_freq,), (length, turn.scaling))
    with rewrite.graph.inserting_before(node):
        made = rewrite.call(ROPE_OP, (x, positions, table), like=node)
    node.replace_all_uses_with(made)
    erase_unread(node)
