"""Functions of single integers, each one op: Inductor gets them as one expression, not as the dozens of operators in them.

    int_rdiv(a, b)   sign(a) * floor((2|a| + b) / 2b), b > 0, |a| < 2**62        halves go away from zero
    int_rsh(a, k)    (a + 2**(k-1)) >> k, k clamped to 1 ... 62                   halves go up
    int_shift(a, k)  a << k, or int_rsh(a, -k) where k < 0
    int_ilog2(a)     position of the highest bit, a >= 1
    int_isqrt(a)     floor(sqrt(a)), 1 <= a < 2**62
    int_exp2neg(z)   2**-z with 15 fraction bits, z >= 0 with 16
    int_sigmoid(x)   1 / (1 + e**-x) with 14 fraction bits, x with 16
    int_inverse(b)   of a divisor that a row shares, 1 <= b < 2**61, for
    int_divided(a, b, inverse)   int_rdiv(a, b) where it is below 2**15: by multiplication, and exact all the same
    int_quotient(a, b, inverse)  the same below 2**29: two such steps
    int_row_rdiv(a, b)           int_rdiv of one number per row
    int_mantissa(d), int_exponent(d)   m and k of dyadic numbers k * 2**18 + m
    int_token_scale(amax, f)           the dyadic number amax / 127 * 2**-f with 16 bits, amax >= 1
    int_scaled(acc, token, row)        acc * m m, shifted to Q16
    int_score(acc, key, query, k)      scores of attention as Q16

Each is written once, for tensors and for what Inductor's kernels hold. All operands and results are int64. A division of each
element would take most of a kernel's time, on a CPU and on a GPU: there is none, only of one number per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FRACTION = 16  # fraction bits of int32 activations
MANTISSA = 18  # bits of m in a dyadic number
LONGEST_SHIFT = 62
EXP_1, EXP_2 = 22020, 5636  # 2**-r ~ 1 - 0.6720 r + 0.1720 r**2 on [0, 1), relative error below 0.33 %
LOG2_E = 23637  # with 14 fraction bits
SCALARS: dict[Any, Callable] = {}  # op -> its function of (operations, *values)
KEPT: set[Any] = (
    set()
)  # ops of one number per row: Inductor stores their results rather than compute them for each element
QUOTIENT = 15  # bits of the quotients of int_divided
INVERSE_BITS = 63 - 31 - QUOTIENT
NEWTON_START = 48 * 2**24 // 17  # 1 / x ~ (48 - 32 x) / 17 on [0.5, 1]


class OnTensors:
    """The operations that values lack as operators, for tensors."""

    where = staticmethod(torch.where)
    abs = staticmethod(torch.abs)

    @staticmethod
    def clamp(a: Tensor, low: int, high: int) -> Tensor:
        """``a`` between two numbers."""
        return a.clamp(low, high)

    @staticmethod
    def div(a: Any, b: Any) -> Tensor:
        """The quotient of two numbers that are not negative, without its fraction."""
        return torch.div(a, b, rounding_mode="trunc")

    @staticmethod
    def one(like: Tensor) -> Tensor:
        """1, as a value that can be shifted."""
        return torch.ones_like(like)


def scalar_op(schema: str, kept: bool = False) -> Callable[[Callable], Callable]:
    """Decorator: an op from a function of ``(operations, *values)``; returns the op. ``kept``: see ``KEPT``."""

    def register(function: Callable) -> Callable:
        name = schema.partition("(")[0]
        torch.library.define(f"intscale::{name}", schema[len(name) :])
        torch.library.impl(f"intscale::{name}", "CompositeExplicitAutograd", lambda *args: function(OnTensors, *args))
        torch.library.register_fake(f"intscale::{name}", lambda *args: _broadcast(args))
        op = getattr(torch.ops.intscale, name).default
        SCALARS[op] = function
        if kept:
            KEPT.add(op)
        return op

    return register


def _broadcast(args: tuple) -> Tensor:
    shape = torch.broadcast_shapes(*(a.shape for a in args))
    return args[0].new_empty(shape, dtype=torch.int64)


def _rsh(o: Any, a: Any, k: Any) -> Any:
    k = o.clamp(k, 1, LONGEST_SHIFT)
    return (a + (o.one(k) << (k - 1))) >> k


def _minus(a: Any) -> Any:
    return (a - a) - a


def _twice(a: Any) -> Any:
    return a + a


def _half_up(a: Any, k: int) -> Any:
    return (a + (1 << (k - 1))) >> k


def _rdiv_positive(o: Any, a: Any, b: Any) -> Any:
    return o.div(a + a + b, b + b)


def _ilog2(o: Any, a: Any) -> Any:
    result = a * 0
    for step in (32, 16, 8, 4, 2, 1):
        high = a >= (1 << step)
        result = o.where(high, result + step, result)
        a = o.where(high, a >> step, a)
    return result


def _exponent(d: Any) -> Any:
    return (d + (1 << (MANTISSA - 1))) >> MANTISSA


def _mantissa(d: Any) -> Any:
    return d - (_exponent(d) << MANTISSA)


def _exp2neg(o: Any, z: Any) -> Any:
    r = (z & ((1 << FRACTION) - 1)) >> (FRACTION - 15)
    y = _half_up(_half_up(r * r, 15) * EXP_2, 15) - _half_up(r * EXP_1, 15) + (1 << 15)
    return y >> o.clamp(z >> FRACTION, 0, 40)


@scalar_op("int_rdiv(Tensor a, Tensor b) -> Tensor")
def RDIV(o: Any, a: Any, b: Any) -> Any:
    """Rounded quotient."""
    magnitude = _rdiv_positive(o, o.abs(a), b)
    return o.where(a >= 0, magnitude, _minus(magnitude))


@scalar_op("int_inverse(Tensor b) -> Tensor", kept=True)
def INVERSE(o: Any, b: Any) -> Any:
    """``floor(2**(30 + INVERSE_BITS) / d)`` of ``d = 2 b``, shifted to 31 bits and rounded up; the shift is in the high bits."""
    d = b + b
    t = _ilog2(o, d) - 30
    right = o.clamp(t, 0, LONGEST_SHIFT)
    shifted = ((d >> right) << o.clamp(_minus(t), 0, LONGEST_SHIFT)) + o.where(t >= 1, o.one(t), t * 0)
    return ((t + 64) << 32) + o.div(o.one(d) << (30 + INVERSE_BITS), shifted)


def _floor_divided(o: Any, n: Any, d: Any, inverse: Any) -> Any:
    """``floor(n / d)`` below ``2**15`` of an even divisor, whose half has this inverse: the estimate is that or one less, and
    the remainder tells which."""
    t = (inverse >> 32) - 64
    shifted = (n >> o.clamp(t, 0, LONGEST_SHIFT)) << o.clamp(_minus(t), 0, LONGEST_SHIFT)
    q = (shifted * (inverse & 0xFFFFFFFF)) >> (30 + INVERSE_BITS)
    return o.where(n - q * d >= d, q + 1, q)


@scalar_op("int_divided(Tensor a, Tensor b, Tensor inverse) -> Tensor")
def DIVIDED(o: Any, a: Any, b: Any, inverse: Any) -> Any:
    """Rounded quotient below ``2**15``."""
    q = _floor_divided(o, _twice(o.abs(a)) + b, b + b, inverse)
    return o.where(a >= 0, q, _minus(q))


@scalar_op("int_quotient(Tensor a, Tensor b, Tensor inverse) -> Tensor")
def LONG_QUOTIENT(o: Any, a: Any, b: Any, inverse: Any) -> Any:
    """Rounded quotient below ``2**29``: its high bits, then 14 more of the remainder."""
    n, d = _twice(o.abs(a)) + b, b + b
    high = _floor_divided(o, n >> 14, d, inverse)
    q = (high << 14) + _floor_divided(o, n - ((high * d) << 14), d, inverse)
    return o.where(a >= 0, q, _minus(q))


@scalar_op("int_row_rdiv(Tensor a, Tensor b) -> Tensor", kept=True)
def ROW_RDIV(o: Any, a: Any, b: Any) -> Any:
    """Rounded quotient of one number per row."""
    magnitude = _rdiv_positive(o, o.abs(a), b)
    return o.where(a >= 0, magnitude, _minus(magnitude))


@scalar_op("int_rsh(Tensor a, Tensor k) -> Tensor")
def RSH(o: Any, a: Any, k: Any) -> Any:
    """Rounded right shift."""
    return _rsh(o, a, k)


@scalar_op("int_shift(Tensor a, Tensor k) -> Tensor")
def SHIFT(o: Any, a: Any, k: Any) -> Any:
    """Shift to the left, or to the right where k is negative."""
    return o.where(k >= 0, a << o.clamp(k, 0, LONGEST_SHIFT), _rsh(o, a, _minus(k)))


@scalar_op("int_ilog2(Tensor a) -> Tensor", kept=True)
def ILOG2(o: Any, a: Any) -> Any:
    """Position of the highest bit."""
    return _ilog2(o, a)


@scalar_op("int_isqrt(Tensor a) -> Tensor", kept=True)
def ISQRT(o: Any, a: Any) -> Any:
    """Root by Newton's method from above, where five steps give 62 bits, and a correction."""
    root = o.one(a) << ((_ilog2(o, a) >> 1) + 1)
    for _ in range(6):
        root = (root + o.div(a, root)) >> 1
    root = o.where(root * root >= a + 1, root - 1, root)
    return o.where(a >= (root + 1) * (root + 1), root + 1, root)


@scalar_op("int_exp2neg(Tensor z) -> Tensor")
def EXP2NEG(o: Any, z: Any) -> Any:
    """Exponential to the base 2 of a negative number."""
    return _exp2neg(o, z)


def _divided_near_one(o: Any, n: Any, d: Any) -> Any:
    """``floor(n / d)`` below ``2**15`` for ``2**16 <= d <= 2**17``.

    Two steps of Newton's method for ``2**41 / d``, from a line that is within 1 / 17: then 2**-16 too small at the most, so that
    the estimate is the quotient or one less.
    """
    y = (d * -15420 >> 6) + NEWTON_START
    for _ in range(2):
        y = (y * (_minus(d * y >> 17) + ((1 << 25) - 1))) >> 24  # rounded down, as all of it
    q = (n * y) >> 41
    return o.where(n - q * d >= d, q + 1, q)


@scalar_op("int_sigmoid(Tensor x) -> Tensor")
def SIGMOID(o: Any, x: Any) -> Any:
    """Logistic function."""
    e = _exp2neg(o, _half_up(o.abs(x) * LOG2_E, 14))
    one = o.one(e) << 15
    sum_ = e + one
    return _divided_near_one(o, (o.where(x >= 0, one, e) << 15) + sum_, sum_ + sum_)


@scalar_op("int_mantissa(Tensor d) -> Tensor")
def MANTISSA_OP(o: Any, d: Any) -> Any:
    """m of a dyadic number."""
    return _mantissa(d)


@scalar_op("int_exponent(Tensor d) -> Tensor")
def EXPONENT_OP(o: Any, d: Any) -> Any:
    """k of a dyadic number."""
    return _exponent(d)


@scalar_op("int_token_scale(Tensor amax, Tensor fraction) -> Tensor", kept=True)
def TOKEN_SCALE(o: Any, amax: Any, fraction: Any) -> Any:
    """The scale of a token's codes."""
    s = _ilog2(o, amax) * -1 + 22
    scaled = o.where(s >= 0, amax << o.clamp(s, 0, LONGEST_SHIFT), amax >> o.clamp(s * -1, 0, LONGEST_SHIFT))
    m = o.div(scaled * 2 + 127, o.one(scaled) * 254)
    return ((s + fraction) << MANTISSA) + m


@scalar_op("int_scaled(Tensor acc, Tensor token, Tensor row) -> Tensor")
def SCALED(o: Any, acc: Any, token: Any, row: Any) -> Any:
    """The accumulator of a linear layer as Q16."""
    return _rsh(o, acc * _mantissa(token) * _mantissa(row), _exponent(token) + _exponent(row) - FRACTION)


@scalar_op("int_score(Tensor acc, Tensor key, Tensor query, Tensor exponent) -> Tensor")
def SCORE(o: Any, acc: Any, key: Any, query: Any, exponent: Any) -> Any:
    """A product of codes as a score: ``query`` is a mantissa, ``exponent`` what it and the key's are shifted by."""
    return _rsh(o, acc * _mantissa(key) * query, exponent + _exponent(key))
