"""The ops of integer-only models in Python's own integers, one number after another: the oracle of the tests."""

from __future__ import annotations

import math


def rsh(a, k):
    return (a + (1 << (k - 1))) >> k


def rsh_by(a, k):
    return rsh(a, min(max(k, 1), 62))


def rdiv(a, b):
    q = (2 * abs(a) + b) // (2 * b)
    return -q if a < 0 else q


def shift(a, k):
    return a << k if k >= 0 else rsh_by(a, -k)


def saturate(a):
    return max(-(2**31), min(2**31 - 1, a))


def exponent(d):
    return (d + 2**17) >> 18


def mantissa(d):
    return d - (exponent(d) << 18)


def exp2neg(z):
    r = (z & 0xFFFF) >> 1
    return (2**15 - rsh(22020 * r, 15) + rsh(5636 * rsh(r * r, 15), 15)) >> min(z >> 16, 40)


def sigmoid(x):
    e = exp2neg(rsh(abs(x) * 23637, 14))
    return rdiv((2**15 if x >= 0 else e) << 14, e + 2**15)


def quantize(row, fraction):
    """``(codes, m, k)`` of one row."""
    amax = max(1, *map(abs, row))
    s = 22 - (amax.bit_length() - 1)
    scaled = amax << s if s >= 0 else amax >> -s
    return [rdiv(127 * x, amax) for x in row], rdiv(scaled, 127), s + fraction


def norm(h, gamma, beta, eps, center):
    """The normed row times gamma, and its fraction bits. ``gamma``: dyadic numbers."""
    n, x = len(h), list(h)
    if center:
        mean = rdiv(sum(a << 8 for a in x), n)
        x = [(a << 8) - mean for a in x]
    s = min(25, (60 - (n - 1).bit_length()) // 2) - (max(1, *map(abs, x)).bit_length() - 1)
    s = min(s, (60 - eps.bit_length()) // 2)
    x = [shift(a, s) for a in x]
    scaled_eps = eps << 2 * s if s >= 0 else eps >> min(-2 * s, 62)
    root = math.isqrt(max(1, rdiv(sum(a * a for a in x), n) + scaled_eps))
    y = [rdiv(a << 15, root) * mantissa(g) for a, g in zip(x, gamma)]
    return [a + b for a, b in zip(y, beta)] if beta else y, 15 + exponent(gamma[0])


def activated(x, kind):
    if kind == "silu":
        return rsh(x * sigmoid(x), 14)
    inner = max(-(16 << 16), min(16 << 16, x))
    cube = rsh(rsh(inner * inner, 16) * inner, 16)
    return rsh(x * sigmoid(rsh((inner + rsh(cube * 1465, 15)) * 26145, 14)), 14)


def linear(codes, token, weight, rows, bias):
    """Q16 of one row; ``weight``: integers ``[N][K]``, ``token`` and ``rows``: dyadic numbers."""
    y = []
    for n, w in enumerate(weight):
        acc = sum(a * b for a, b in zip(codes, w))
        k = exponent(token) + exponent(rows[n]) - 16
        y.append(saturate(rsh_by(acc * mantissa(token) * mantissa(rows[n]), k) + (bias[n] if bias else 0)))
    return y


def rope(x, row):
    """One head's features, with the row of the table for its position."""
    half = len(x) // 2
    a, b, cos, sin = x[:half], x[half:], row[:half], row[half:]
    first = [saturate(rsh(p * c - q * s, 14)) for p, q, c, s in zip(a, b, cos, sin)]
    return first + [saturate(rsh(q * c + p * s, 14)) for p, q, c, s in zip(a, b, cos, sin)]


def attention(q, q_scale, keys, key_scales, values, value_scales, seen, c_m, c_k):
    """One query over the keys that it sees."""
    scores = []
    for k, d in zip(keys, key_scales):
        acc = sum(a * b for a, b in zip(q, k))
        shifts = exponent(q_scale) + exponent(d) + c_k - 31
        scores.append(rsh_by(acc * mantissa(d) * ((mantissa(q_scale) * c_m) >> 15), shifts))
    top = max((s for s, see in zip(scores, seen) if see), default=0)
    e = [exp2neg(top - s) if see else 0 for s, see in zip(scores, seen)]
    p = [rdiv(one << 14, max(1, sum(e))) for one in e]
    v = [[saturate(rsh_by(a * mantissa(d), exponent(d) - 12)) for a in row] for row, d in zip(values, value_scales)]
    return [saturate(rsh(sum(a * row[i] for a, row in zip(p, v)), 10)) for i in range(len(values[0]))]
