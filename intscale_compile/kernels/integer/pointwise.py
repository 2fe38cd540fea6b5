"""Elementwise ops on Q16: the saturating addition, an activation, rotary position embedding, and the doors in and out.

``int_add``          residual stream: int32 + int32, saturating
``int_activation``   SiLU or GELU, Q16 to Q16
``int_rope``         ``rsh(x1 cos - x2 sin, 14)``, ``rsh(x2 cos + x1 sin, 14)``; the table holds cosines and sines with 14 bits
``int_embedding``    ``rsh(code * m, k - 16)``, one dyadic scale for each row of the table
``int_to_float``     ``float32(x) * 2**-16``, the one conversion at the end of the graph
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import FRACTION, exponent, mantissa, rsh, rsh_by, saturate, sigmoid
from .define import integer_op

TABLE = 14  # fraction bits of cosines and sines
GELU_CUBE, GELU_SLOPE = 1465, 26145  # 0.044715 * 2**15, 2 sqrt(2 / pi) * 2**14


def _like_first(a: Tensor, *_) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@integer_op("int_add(Tensor a, Tensor b) -> Tensor", lambda a, b: (a + b).contiguous())
def ADD_OP(a: Tensor, b: Tensor) -> Tensor:
    """Saturating sum of two int32 tensors."""
    return saturate(a.to(torch.int64) + b.to(torch.int64))


def activated(x: Tensor, kind: str) -> Tensor:
    """``x * sigmoid(x)`` or GELU of int64 Q16, int64 Q16. Both forms of GELU are ``x * sigmoid(1.5958 (x + 0.044715 x**3))``."""
    if kind == "silu":
        return rsh(x * sigmoid(x), 14)
    inner = x.clamp(-(16 << FRACTION), 16 << FRACTION)  # beyond, the sigmoid is 0 or 1
    cube = rsh(rsh(inner * inner, FRACTION) * inner, FRACTION)
    z = rsh((inner + rsh(cube * GELU_CUBE, 15)) * GELU_SLOPE, 14)
    return rsh(x * sigmoid(z), 14)


@integer_op("int_activation(Tensor x, str kind) -> Tensor", _like_first)
def ACTIVATION_OP(x: Tensor, kind: str) -> Tensor:
    """SiLU (``"silu"``) or GELU (``"gelu"``) of Q16."""
    return saturate(activated(x.to(torch.int64), kind))


@integer_op("int_rope(Tensor x, Tensor positions, Tensor table) -> Tensor", _like_first)
def ROPE_OP(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotary position embedding of heads.

    Args:
        x: int32 ``[B, H, T, D]``.
        positions: int64 ``[1 or B, T]``, below the length of the table.
        table: int16 ``[L, D]``: D / 2 cosines, D / 2 sines.
    """
    half = x.shape[-1] // 2
    turns = table[positions].unsqueeze(1).to(torch.int64)
    cos, sin = turns[..., :half], turns[..., half:]
    wide = x.to(torch.int64)
    a, b = wide[..., :half], wide[..., half:]
    return saturate(torch.cat([rsh(a * cos - b * sin, TABLE), rsh(b * cos + a * sin, TABLE)], -1))


def rope_table(inv_freq: Tensor, length: int, scaling: float) -> Tensor:
    """The table of ``int_rope`` for frequencies ``[D / 2]``: int16 ``[length, D]``, computed on the CPU in float64."""
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inv_freq.detach().to("cpu", torch.float64))
    both = torch.cat([angles.cos(), angles.sin()], -1) * (scaling * 2**TABLE)
    return both.round().clamp(-(2**15), 2**15 - 1).to(torch.int16).to(inv_freq.device)


@integer_op(
    "int_embedding(Tensor ids, Tensor table, Tensor scale) -> Tensor",
    lambda ids, table, scale: table.new_empty((*ids.shape, table.shape[1]), dtype=torch.int32),
)
def EMBEDDING_OP(ids: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Rows of an int8 table ``[V, D]`` with dyadic scales ``[V]``, as Q16."""
    d = scale[ids].unsqueeze(-1)
    return saturate(rsh_by(table[ids].to(torch.int64) * mantissa(d), exponent(d) - FRACTION))


@integer_op(
    "int_to_float(Tensor x, ScalarType dtype) -> Tensor",
    lambda x, dtype: torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),
)
def TO_FLOAT_OP(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Q16 to floating point: one rounding to fp32, exact below 256, then to ``dtype``."""
    return (x.to(torch.float32) * 2.0**-FRACTION).to(dtype)
