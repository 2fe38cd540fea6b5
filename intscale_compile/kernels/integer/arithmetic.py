"""Integer arithmetic that the ops share, on int64 tensors; the functions of single integers are ops of :mod:`.scalar`."""

from __future__ import annotations

import math
from typing import Union

import torch
from torch import Tensor

from .scalar import (
    DIVIDED,
    EXP2NEG,
    EXPONENT_OP,
    FRACTION,
    ILOG2,
    INVERSE,
    ISQRT,
    LONG_QUOTIENT,
    LONGEST_SHIFT,
    MANTISSA,
    MANTISSA_OP,
    RDIV,
    ROW_RDIV,
    RSH,
    SHIFT,
    SIGMOID,
    TOKEN_SCALE,
)

__all__ = [
    "CODE",
    "FRACTION",
    "LONGEST_SHIFT",
    "MANTISSA",
    "divide_rows",
    "dyadic_number",
    "dyadic_of",
    "exp2neg",
    "exponent",
    "hadamard",
    "ilog2",
    "isqrt",
    "largest",
    "long_quotient",
    "mantissa",
    "pack_dyadic",
    "quantize_rows",
    "quantize_to",
    "rdiv",
    "rotate_quantize",
    "row_rdiv",
    "rsh",
    "rsh_by",
    "saturate",
    "shift",
    "sigmoid",
]

CODE = 127  # largest magnitude of a code
rdiv, row_rdiv, rsh_by, shift, ilog2, isqrt, exp2neg, sigmoid = (
    RDIV,
    ROW_RDIV,
    RSH,
    SHIFT,
    ILOG2,
    ISQRT,
    EXP2NEG,
    SIGMOID,
)


def rsh(a: Tensor, k: int) -> Tensor:
    """``a / 2**k``, rounded, halves up; ``k >= 1``."""
    return (a + (1 << (k - 1))) >> k


def divide_rows(a: Tensor, b: Tensor) -> Tensor:
    """``rdiv(a, b)`` of rows that share a divisor ``b [..., 1]`` below ``2**61``, where the quotients are below ``2**15``."""
    return DIVIDED(a, b, INVERSE(b))


def long_quotient(a: Tensor, b: Tensor) -> Tensor:
    """:func:`divide_rows` where the quotients are below ``2**29``."""
    return LONG_QUOTIENT(a, b, INVERSE(b))


def saturate(a: Tensor) -> Tensor:
    """int64 to int32; what does not fit becomes the nearest that does."""
    return a.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def mantissa(d: Tensor) -> Tensor:
    """``m`` of dyadic numbers, int64."""
    return MANTISSA_OP(d.to(torch.int64))


def exponent(d: Tensor) -> Tensor:
    """``k`` of dyadic numbers, int64."""
    return EXPONENT_OP(d.to(torch.int64))


def pack_dyadic(m: Tensor, k: Tensor) -> Tensor:
    """``m * 2**-k`` in one int32: ``|m| < 2**17``, ``|k| < 2**13``."""
    return ((k << MANTISSA) + m).to(torch.int32)


def dyadic_of(values: Tensor, bits: int = 15, common: bool = False) -> Tensor:
    """Dyadic numbers nearest to floating point ones, computed once for a weight on the CPU; ``bits`` of magnitude in m.

    Args:
        values: floating point, any shape; its magnitudes are below ``2**(bits - 1)``.
        common: one exponent for all, that of the largest magnitude.

    Returns:
        int32 of the same shape, on the device of ``values``.
    """
    x = values.detach().to("cpu", torch.float64)
    size = x.abs().amax().expand_as(x) if common and x.numel() else x.abs()
    k = bits - torch.frexp(torch.where(size > 0, size, 1.0))[1].to(torch.int64)
    over = torch.ldexp(x, k).round().abs() >= (1 << bits)
    k = torch.where(over.any() if common else over, k - 1, k)
    return pack_dyadic(torch.ldexp(x, k).round().to(torch.int64), k).to(values.device)


def dyadic_number(value: float, bits: int = 15) -> tuple[int, int]:
    """``(m, k)`` of one positive number."""
    k = bits - math.frexp(value)[1]
    m = round(math.ldexp(value, k))
    return (m >> 1, k - 1) if m >= 1 << bits else (m, k)


def quantize_rows(x: Tensor, fraction: Union[Tensor, int]) -> tuple[Tensor, Tensor]:
    """Codes and token scales of rows: ``q = rdiv(127 x, max |x|)``, scale ``max |x| / 127`` with 16 bits.

    Args:
        x: int64 ``[..., K]`` with ``fraction`` fraction bits (a number, or int64 ``[1]``), ``|x| < 2**55``.

    Returns:
        int8 ``[..., K]`` in [-127, 127], and dyadic int32 ``[..., 1]``.
    """
    return quantize_to(x, largest(x), fraction)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude of each row of int64 ``[..., K]``, at least 1: ``[..., 1]``."""
    return x.abs().amax(-1, keepdim=True).clamp(min=1)


def quantize_to(x: Tensor, amax: Tensor, fraction: Union[Tensor, int]) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows` where the largest magnitudes ``[..., 1]`` are known."""
    bits = fraction if isinstance(fraction, Tensor) else x.new_full((1,), fraction)
    return divide_rows(CODE * x, amax).to(torch.int8), TOKEN_SCALE(amax, bits).to(torch.int32)


def hadamard(x: Tensor, size: int) -> Tensor:
    """The transform without its factor ``size**-0.5``, over blocks of the last dimension; int64, ``size`` a power of two."""
    shape, step = x.shape, 1
    x = x.reshape(*shape[:-1], shape[-1] // size, size)
    while step < size:
        pair = x.reshape(*x.shape[:-1], size // (2 * step), 2, step)
        a, b = pair[..., 0, :], pair[..., 1, :]
        x = torch.stack([a + b, a - b], -2).reshape(x.shape)
        step *= 2
    return x.reshape(shape)


def rotate_quantize(x: Tensor, fraction: Union[Tensor, int], rotation: int) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows` of a row after its Hadamard transform over blocks of ``rotation``; 0: of the row itself."""
    if not rotation:
        return quantize_rows(x, fraction)
    codes, scale = quantize_rows(hadamard(x, rotation), fraction)
    return codes, rotated_scale(scale, rotation)


def rotated_scale(scale: Tensor, rotation: int) -> Tensor:
    """Token scales of rows after :func:`hadamard`, with its factor."""
    m, k, log2 = mantissa(scale), exponent(scale), rotation.bit_length() - 1
    m = rsh(m * 23170, 15) if log2 % 2 else m  # 2**-0.5
    return pack_dyadic(m, k + log2 // 2)
