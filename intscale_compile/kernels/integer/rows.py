"""Ops that end in codes: quantization, norms and gated activations, each with one dyadic scale per token.

    int_quantize(x)                    Q16 to codes
    int_norm(h), int_norm_quantize(h)  RMSNorm or LayerNorm, to Q16 or to codes
    int_gate_quantize(g, u)            act(g) * u, to codes;   int_activation_quantize(x): act(x), to codes
    int_gate, int_activated            the same before it is quantized;   int_largest, int_quantize_to: quantization in two parts

``rotation``: the weight behind was multiplied by a Hadamard transform of blocks of this size; 0: it was not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import (
    FRACTION,
    exponent,
    hadamard,
    ilog2,
    isqrt,
    largest,
    long_quotient,
    mantissa,
    quantize_to,
    rotate_quantize,
    rotated_scale,
    row_rdiv,
    rsh,
    rsh_by,
    saturate,
    shift,
)
from .define import integer_op
from .pointwise import activated

Codes = tuple[Tensor, Tensor]
CENTERED = 8  # more fraction bits while a mean is subtracted
GATED = 20  # fraction bits of a gated activation


def _codes(x: Tensor, *_) -> Codes:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.int32)


@integer_op("int_quantize(Tensor x, int rotation=0) -> (Tensor, Tensor)", _codes)
def QUANTIZE_OP(x: Tensor, rotation: int = 0) -> Codes:
    """Codes int8 ``[..., K]`` and dyadic scales ``[..., 1]`` of int32 ``[..., K]``."""
    return rotate_quantize(x.to(torch.int64), FRACTION, rotation)


def highest_bit(features: int) -> int:
    """To which bit rows are shifted before they are squared: the sum of ``features`` squares stays below ``2**62``."""
    return min(25, (60 - (features - 1).bit_length()) // 2)


def normed(h: Tensor, gamma: Tensor, beta: Tensor | None, eps: int, center: bool) -> Codes:
    """Norm of int32 rows times gamma: int64 ``[..., K]`` and its fraction bits (of ``gamma``, plus 15), int64 ``[1]``.

    Args:
        gamma: dyadic ``[K]`` with one exponent.
        beta: int64 ``[K]`` with 15 more fraction bits than gamma, or None.
        eps: of the norm, times ``2**32`` (LayerNorm: ``2**48``).
        center: subtract the mean (LayerNorm).
    """
    x, n = h.to(torch.int64), h.shape[-1]
    if center:
        x = x << CENTERED
        x = x - row_rdiv(x.sum(-1, keepdim=True), x.new_full((1,), n))
    s = highest_bit(n) - ilog2(x.abs().amax(-1, keepdim=True).clamp(min=1))
    s = s.clamp(max=(60 - eps.bit_length()) // 2)  # beyond, eps alone decides
    x = shift(x, s)
    scaled_eps = torch.where(s >= 0, eps << (2 * s).clamp(0, 60), eps >> (-2 * s).clamp(0, 62))
    squares = row_rdiv((x * x).sum(-1, keepdim=True), x.new_full((1,), n)) + scaled_eps
    y = long_quotient(x << 15, isqrt(squares.clamp(min=1))) * mantissa(gamma)
    return y if beta is None else y + beta, 15 + exponent(gamma.narrow(0, 0, 1))


_NORM = "(Tensor h, Tensor gamma, Tensor? beta, int eps, bool center"


@integer_op(f"int_norm_quantize{_NORM}, int rotation=0) -> (Tensor, Tensor)", _codes)
def NORM_QUANTIZE_OP(h: Tensor, gamma: Tensor, beta: Tensor | None, eps: int, center: bool, rotation: int = 0) -> Codes:
    """Norm and quantization of int32 ``[..., K]``; arguments as of :func:`normed`."""
    return rotate_quantize(*normed(h, gamma, beta, eps, center), rotation)


@integer_op(f"int_norm{_NORM}) -> Tensor", lambda h, *_: h.new_empty(h.shape))
def NORM_OP(h: Tensor, gamma: Tensor, beta: Tensor | None, eps: int, center: bool) -> Tensor:
    """Norm of int32 ``[..., K]`` to Q16; arguments as of :func:`normed`."""
    y, fraction = normed(h, gamma, beta, eps, center)
    return saturate(rsh_by(y, fraction - FRACTION))


def gate(g: Tensor, u: Tensor, kind: str) -> Tensor:
    """``act(g) * u`` of two int32 ``[..., K]``: int64 with 20 fraction bits."""
    return rsh(activated(g.to(torch.int64), kind) * u.to(torch.int64), 2 * FRACTION - GATED)


@integer_op("int_gate_quantize(Tensor g, Tensor u, str kind, int rotation=0) -> (Tensor, Tensor)", _codes)
def GATE_QUANTIZE_OP(g: Tensor, u: Tensor, kind: str, rotation: int = 0) -> Codes:
    """``act(g) * u`` of two int32 ``[..., K]`` with 20 fraction bits, quantized."""
    return rotate_quantize(gate(g, u, kind), GATED, rotation)


@integer_op("int_activation_quantize(Tensor x, str kind, int rotation=0) -> (Tensor, Tensor)", _codes)
def ACTIVATION_QUANTIZE_OP(x: Tensor, kind: str, rotation: int = 0) -> Codes:
    """``act(x)`` of int32 ``[..., K]``, quantized."""
    return rotate_quantize(activated(x.to(torch.int64), kind), FRACTION, rotation)


# --- the same in parts, for rows that are divided among ranks ---------------------------------------------------------


GATE_OP = integer_op(
    "int_gate(Tensor g, Tensor u, str kind) -> Tensor", lambda g, u, kind: g.new_empty(g.shape, dtype=torch.int64)
)(gate)


@integer_op("int_activated(Tensor x, str kind) -> Tensor", lambda x, kind: x.new_empty(x.shape, dtype=torch.int64))
def ACTIVATED_OP(x: Tensor, kind: str) -> Tensor:
    """``act(x)`` of int32 ``[..., K]``: int64 with 16 fraction bits."""
    return activated(x.to(torch.int64), kind)


@integer_op(
    "int_largest(Tensor x, int rotation) -> Tensor", lambda x, _: x.new_empty((*x.shape[:-1], 1), dtype=torch.int64)
)
def LARGEST_OP(x: Tensor, rotation: int) -> Tensor:
    """The largest magnitude of each row of integers ``[..., K]``, after its Hadamard transform: int64 ``[..., 1]``."""
    wide = x.to(torch.int64)
    return largest(hadamard(wide, rotation) if rotation else wide)


@integer_op("int_quantize_to(Tensor x, Tensor amax, int fraction, int rotation) -> (Tensor, Tensor)", _codes)
def QUANTIZE_TO_OP(x: Tensor, amax: Tensor, fraction: int, rotation: int) -> Codes:
    """Codes and scales of rows of integers ``[..., K]`` whose largest magnitude is known."""
    wide = x.to(torch.int64)
    if not rotation:
        return quantize_to(wide, amax, fraction)
    codes, scale = quantize_to(hadamard(wide, rotation), amax, fraction)
    return codes, rotated_scale(scale, rotation)


QUANTIZERS = (QUANTIZE_OP, NORM_QUANTIZE_OP, GATE_QUANTIZE_OP, ACTIVATION_QUANTIZE_OP, QUANTIZE_TO_OP)
