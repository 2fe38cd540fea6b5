"""Integer norms: RMSNorm and LayerNorm, with the quantization behind them where there is one.

    quantize_per_token(gamma * (h * rsqrt(mean(h ** 2) + eps)))  =>  int_norm_quantize(h, gamma, eps)
    rms_norm(h, gamma), layer_norm(h, gamma, beta)               =>  the same

Other readers of the norm get ``int_norm``. Matches constant gammas of one dimension over the last dimension of ``h``. Left
alone: norms whose factor is computed, such as Gemma's ``1 + gamma``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional

import torch
from torch import fx

from ...kernels.integer.arithmetic import FRACTION
from ...kernels.integer.rows import CENTERED, NORM_OP, NORM_QUANTIZE_OP
from ..base import GraphRewrite, Pass, example
from ..match import argument
from ..packed_weights import WeightSource
from .nodes import codes_for_readers, either, emitter, erase_unread, is_float, name_of, number
from .parts import part_input, source_of


class _Norm(NamedTuple):
    """What a norm is made of."""

    h: fx.Node
    gamma: WeightSource
    beta: Optional[WeightSource]
    eps: float
    center: bool


def integer_norms(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        found = _match(rewrite, node) if is_float(example(node)) else None
        if found is not None:
            _replace(rewrite, node, found)
            done += 1
    return done


INTEGER_NORMS = Pass("integer_norms", integer_norms)


def _match(rewrite: GraphRewrite, node: fx.Node) -> Optional[_Norm]:
    name = name_of(node)
    if name == "mul":
        return either(node, "mul", lambda weight, normed: _written_out(rewrite, weight, normed))
    if name not in ("rms_norm", "layer_norm"):
        return None
    h, weight, beta = node.args[0], argument(node, 2, "weight"), None
    if name == "layer_norm":
        beta = argument(node, 3, "bias")
    eps = argument(node, 4 if name == "layer_norm" else 3, "eps")
    gamma, shift = source_of(rewrite, weight), source_of(rewrite, beta)
    eps = torch.finfo(example(node).dtype).eps if eps is None else number(eps)
    over_last = len(argument(node, 1, "normalized_shape")) == 1
    if gamma is None or eps is None or not over_last or (shift is None) != (beta is None):
        return None
    return _Norm(h, gamma, shift, eps, name == "layer_norm")  # type: ignore[arg-type]


def _written_out(rewrite: GraphRewrite, weight: Any, normed: Any) -> Optional[_Norm]:
    """``weight * (h * rsqrt(mean(h ** 2, -1, keepdim=True) + eps))``."""
    gamma = source_of(rewrite, weight)
    if gamma is None or example(weight).dim() != 1:
        return None
    inner = either(normed, "mul", _times_root)
    return None if inner is None else _Norm(inner[0], gamma, None, inner[1], False)


def _times_root(h: Any, root: Any) -> Optional[tuple[fx.Node, float]]:
    if name_of(root) != "rsqrt":
        return None
    found = either(root.args[0], "add", lambda mean, eps: _mean_and_eps(mean, eps))
    return (h, found[1]) if found is not None and found[0] is h else None


def _mean_and_eps(mean: Any, eps: Any) -> Optional[tuple[Any, float]]:
    value = number(eps)
    squares: Any = mean.args[0] if name_of(mean) == "mean" else None
    over_last = squares is not None and argument(mean, 1, "dim") in (-1, [-1], (-1,))
    if value is None or not over_last or argument(mean, 2, "keepdim") is not True:
        return None
    if name_of(squares) == "pow" and squares.args[1:] == (2,) or name_of(squares) == "square":
        return squares.args[0], value
    return None


def _replace(rewrite: GraphRewrite, node: fx.Node, norm: _Norm) -> None:
    gamma = part_input(rewrite, "gamma", (norm.gamma,))
    beta = None if norm.beta is None else part_input(rewrite, "beta", (norm.gamma, norm.beta))
    bits = 2 * (FRACTION + (CENTERED if norm.center else 0))
    arguments = (norm.h, gamma, beta, round(math.ldexp(norm.eps, bits)), norm.center)
    codes_for_readers(rewrite, node, emitter(rewrite, NORM_QUANTIZE_OP, arguments, node))
    if node.users:
        with rewrite.graph.inserting_before(node):
            made = rewrite.call(NORM_OP, arguments, like=node)
        node.replace_all_uses_with(made)
    erase_unread(node)
