"""``intscale::int_attention``: attention over codes, probabilities with 15 bits.

    s = rsh(q . k * m_k * ((m_q c) >> 15), k_q + k_k + k_c - 31)     Q16, in units of log2: c = log2(e) * scale
    e = exp2neg(max(s) - s), 0 where masked;   p = rdiv(e << 14, sum(e));   y = rsh(sum p * rsh(v m_v, k_v - 12), 10)

A query that sees no key gets zeros. Heads that share keys are rows of one product.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .arithmetic import divide_rows, exp2neg, exponent, mantissa, rsh, rsh_by, saturate
from .cpu_attention import attention_cpu
from .define import integer_op
from .scalar import SCORE

VALUE = 12  # fraction bits of values
HIDDEN = -(1 << 62)  # no score is below


def _fake_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.int64)


torch.library.define("intscale::int_product", "(Tensor a, Tensor b) -> Tensor")
torch.library.register_fake("intscale::int_product", _fake_product)
PRODUCT_OP = torch.ops.intscale.int_product.default


@torch.library.impl("intscale::int_product", "CompositeExplicitAutograd")
def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of integers whose sums stay below ``2**53``, int64: a float64 product of such integers is exact.

    Two int8 operands with sums below ``2**24`` take float32, on a CPU only: on a GPU it might be TF32.
    """
    narrow = a.dtype == b.dtype == torch.int8 and a.shape[-1] < 1024 and a.device.type == "cpu"
    dtype = torch.float32 if narrow else torch.float64
    with torch.autocast(a.device.type, enabled=False):  # it would round float32
        return (a.to(dtype) @ b.to(dtype)).to(torch.int64)


def _fake(q: Tensor, *_) -> Tensor:
    return q.new_empty(q.shape, dtype=torch.int32)


ATTENTION = (
    "int_attention(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, Tensor v, Tensor v_scale, Tensor? mask, bool causal, "
    "int c_m, int c_k) -> Tensor"
)


def attention_aten(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, mask: Optional[Tensor], causal: bool,
    c_m: int, c_k: int,
) -> Tensor:  # fmt: skip
    """Attention of int8 queries ``[B, H, T, D]`` over int8 keys and values ``[B, KH, S, D]``; int32 Q16 ``[B, H, T, D]``.

    Args:
        q_scale, k_scale, v_scale: dyadic, one for each token and head: ``[..., 1]``.
        mask: bool, broadcastable to ``[B, H, T, S]``, True: attend; None: all.
        causal: query t sees the keys up to t.
        c_m, c_k: ``log2(e)`` times the scale of scores, a dyadic number.
    """
    (batch, heads, tokens, features), (shared, keys) = q.shape, k.shape[1:3]
    rows = (batch, shared, heads // shared * tokens)
    acc = PRODUCT_OP(q.reshape(*rows, features), k.transpose(2, 3)).view(batch, heads // shared * shared, tokens, keys)

    def per_key(x: Tensor) -> Tensor:  # [B, KH, S, 1] to [B, H, 1, S]
        x = x.transpose(2, 3).unsqueeze(2).expand(batch, shared, heads // shared, 1, keys)
        return x.reshape(batch, heads, 1, keys)

    query = (mantissa(q_scale) * c_m) >> 15
    s = SCORE(acc, per_key(k_scale.to(torch.int64)), query, exponent(q_scale) + (c_k - 31))
    seen = mask
    if causal:
        order = torch.arange(keys, device=q.device) <= torch.arange(tokens, device=q.device).unsqueeze(-1)
        seen = order if mask is None else order & mask
    if seen is not None:
        s = torch.where(seen, s, HIDDEN)
    e = exp2neg(s.amax(-1, keepdim=True) - s)
    if seen is not None:
        e = torch.where(seen, e, 0)
    total = e.sum(-1, keepdim=True).clamp(min=1)
    p = divide_rows(e << 14, total).to(torch.int16)
    values = saturate(rsh_by(v.to(torch.int64) * mantissa(v_scale), exponent(v_scale) - VALUE))
    y = PRODUCT_OP(p.view(*rows, keys), values)
    return saturate(rsh(y, 14 + VALUE - 16)).view(batch, heads, tokens, features)


ATTENTION_OP = integer_op(ATTENTION, _fake, fuses=False)(attention_aten)


@torch.library.impl("intscale::int_attention", "CPU")
def _attention_cpu(*arguments) -> Tensor:
    found = attention_cpu(*arguments)
    return attention_aten(*arguments) if found is None else found


@torch.library.impl("intscale::int_attention", "CUDA")
def _attention_gpu(*arguments) -> Tensor:
    # Imports Triton, which only GPUs need.
    from .triton_attention import attention_gpu

    found = attention_gpu(*arguments)
    return attention_aten(*arguments) if found is None else found
