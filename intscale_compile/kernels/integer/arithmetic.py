"""Integer arithmetic that the ops share, on int64 tensors: rounding shifts and divisions, logarithm, root, exponential.

    rsh(a, k)     (a + 2**(k-1)) >> k            halves go up
    rdiv(a, b)    sign(a) * floor((2|a| + b) / 2b)    halves go away from zero, b > 0
    dyadic        k * 2**18 + m in one int32: the number m * 2**-k, m signed with 18 bits

Inductor makes these functions a part of the kernels around them; no value is ever a float.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FRACTION = 16  # fraction bits of int32 activations
MANTISSA = 18  # bits of m in a dyadic number
LONGEST_SHIFT = 62
CODE = 127  # largest magnitude of a code
_EXP_1, _EXP_2 = 22020, 5636  # 2**-r ~ 1 - 0.6720 r + 0.1720 r**2 on [0, 1), relative error below 0.33 %


def rsh(a: Tensor, k: int) -> Tensor:
    """``a / 2**k``, rounded; ``k >= 1``."""
    return (a + (1 << (k - 1))) >> k


def rsh_by(a: Tensor, k: Tensor) -> Tensor:
    """``a / 2**k`` for a tensor of shifts, which are clamped to 1 ... 62."""
    k = k.clamp(1, LONGEST_SHIFT)
    return (a + (torch.ones_like(k) << (k - 1))) >> k


def rdiv(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` rounded, ``b > 0``, ``|a| < 2**62``."""
    magnitude = torch.div(2 * a.abs() + b, 2 * b, rounding_mode="trunc")
    return torch.where(a < 0, -magnitude, magnitude)


def shift(a: Tensor, k: Tensor) -> Tensor:
    """``a * 2**k`` for shifts of either sign, rounded where ``k < 0``."""
    return torch.where(k >= 0, a << k.clamp(min=0), rsh_by(a, -k))


def ilog2(a: Tensor) -> Tensor:
    """Position of the highest bit of ``a >= 1``."""
    result = torch.zeros_like(a)
    for step in (32, 16, 8, 4, 2, 1):
        high = a >= (1 << step)
        result = result + torch.where(high, step, 0)
        a = torch.where(high, a >> step, a)
    return result


def isqrt(a: Tensor) -> Tensor:
    """``floor(sqrt(a))`` of ``1 <= a < 2**62``: Newton's method from above, where five steps give 62 bits, and a correction."""
    root = torch.ones_like(a) << ((ilog2(a) >> 1) + 1)
    for _ in range(6):
        root = (root + torch.div(a, root, rounding_mode="trunc")) >> 1
    root = torch.where(root * root > a, root - 1, root)
    return torch.where((root + 1) * (root + 1) <= a, root + 1, root)


def exp2neg(z: Tensor, fraction: int = FRACTION) -> Tensor:
    """``2**-z`` with 15 fraction bits of ``z >= 0`` with ``fraction >= 15`` fraction bits."""
    whole, r = z >> fraction, (z & ((1 << fraction) - 1)) >> (fraction - 15)
    y = (1 << 15) - rsh(_EXP_1 * r, 15) + rsh(_EXP_2 * rsh(r * r, 15), 15)
    return y >> whole.clamp(max=40)


def saturate(a: Tensor) -> Tensor:
    """int64 to int32; what does not fit becomes the nearest that does."""
    return a.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def mantissa(d: Tensor) -> Tensor:
    """``m`` of dyadic numbers, int64."""
    d = d.to(torch.int64)
    return d - (exponent(d) << MANTISSA)


def exponent(d: Tensor) -> Tensor:
    """``k`` of dyadic numbers, int64."""
    return (d.to(torch.int64) + (1 << (MANTISSA - 1))) >> MANTISSA


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
    k = (bits - 1) - torch.frexp(torch.where(size > 0, size, 1.0))[1].to(torch.int64) + 1
    m = torch.ldexp(x, k).round().to(torch.int64)
    over = m.abs() >= (1 << bits)
    if common:
        over = over.any().expand_as(over)
    k = torch.where(over, k - 1, k)
    m = torch.ldexp(x, k).round().to(torch.int64)
    return pack_dyadic(m, k).to(values.device)


def dyadic_number(value: float, bits: int = 15) -> tuple[int, int]:
    """``(m, k)`` of one positive number."""
    k = bits - math.frexp(value)[1]
    m = round(math.ldexp(value, k))
    return (m >> 1, k - 1) if m >= 1 << bits else (m, k)


def quantize_rows(x: Tensor, fraction: Tensor | int) -> tuple[Tensor, Tensor]:
    """Codes and token scales of rows: ``q = rdiv(127 x, max |x|)``, scale ``max |x| / 127`` with 16 bits.

    Args:
        x: int64 ``[..., K]`` with ``fraction`` fraction bits (a number, or int64 ``[..., 1]``), ``|x| < 2**55``.

    Returns:
        int8 ``[..., K]`` in [-127, 127], and dyadic int32 ``[..., 1]``.
    """
    amax = x.abs().amax(-1, keepdim=True).clamp(min=1)
    codes = rdiv(CODE * x, amax).to(torch.int8)
    s = 22 - ilog2(amax)
    scaled = torch.where(s >= 0, amax << s.clamp(min=0), amax >> (-s).clamp(min=0))
    m = torch.div(2 * scaled + CODE, 2 * CODE, rounding_mode="trunc")
    return codes, pack_dyadic(m, s + fraction)


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


def rotate_quantize(x: Tensor, fraction: Tensor | int, rotation: int) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows` of a row after its Hadamard transform over blocks of ``rotation``; 0: of the row itself."""
    if not rotation:
        return quantize_rows(x, fraction)
    codes, scale = quantize_rows(hadamard(x, rotation), fraction)
    m, k, log2 = mantissa(scale), exponent(scale), rotation.bit_length() - 1
    m = rsh(m * 23170, 15) if log2 % 2 else m  # 2**-0.5
    return codes, pack_dyadic(m, k + log2 // 2)


def sigmoid(x: Tensor, fraction: int = FRACTION) -> Tensor:
    """``1 / (1 + 2**(-x log2 e))`` with 14 fraction bits."""
    e = exp2neg(rsh(x.abs() * 23637, 14), fraction)
    positive = torch.where(x >= 0, 1 << 15, e)
    return torch.div(2 * (positive << 14) + e + (1 << 15), 2 * (e + (1 << 15)), rounding_mode="trunc")
