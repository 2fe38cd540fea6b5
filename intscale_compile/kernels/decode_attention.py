"""``intscale::decode_attention``: attention of one new token per sequence over its cache of keys and values.

    out[b, h] = softmax(scale * q[b, h] . k[b, h // G] + mask[b, h]) @ v[b, h // G]        G query heads share a key head

Reads every key and value once for all G heads, where PyTorch's kernels take copies expanded to one per query head as
soon as there is a mask, and does not read what the mask hides. The keys are cut into parts whose size depends on their
number alone, added up in a fixed order: a sequence gets the same bits in every batch (flash decoding, arXiv 2311.01282).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..errors import InputError
from .prepared import on_gpu

torch.library.define(
    "intscale::decode_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, int abi, bool overlap=False) -> Tensor",
)
OP = torch.ops.intscale.decode_attention.default
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KEY = 64


def unsupported(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Optional[str]:
    """Why the kernel cannot take these operands (fake ones will do), or None.

    Args:
        q: bf16 or fp16 ``[B, H, 1, D]``.
        k, v: like ``q``, ``[B, KH, L, D]``; ``KH`` divides ``H``.
        mask: bool (True: attend) or float (added), broadcastable to ``[B, H, 1, L]``; None attends to everything.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        return "query, key and value must have four dimensions, key and value the same shape"
    if q.shape[2] != 1 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return "one query token per sequence is supported, with the keys' batch and head size"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: one of bfloat16 and float16 is needed"
    if q.shape[1] % k.shape[1] or q.shape[1] // k.shape[1] > MAX_HEADS_PER_KEY or q.shape[3] > MAX_HEAD_DIM:
        return f"{q.shape[1]} query heads on {k.shape[1]} key heads of {q.shape[3]} features"
    if mask is not None and (mask.dim() != 4 or not (mask.dtype is torch.bool or mask.dtype.is_floating_point)):
        return f"a mask of {mask.dim()} dimensions and {mask.dtype}"
    return None


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> None:
    problem = unsupported(q, k, v, mask)
    if problem is not None:
        raise InputError(f"decode_attention: {problem}.")


@torch.library.impl("intscale::decode_attention", "CPU")
def _decode_attention_cpu(q, k, v, mask, scale, abi, overlap=False):
    _check(q, k, v, mask)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.reshape(-1).view(q.shape)  # "contiguous" would keep any stride of the dimension of size 1


@on_gpu("intscale::decode_attention")
def _decode_attention_cuda(q, k, v, mask, scale, abi, overlap=False):
    # Imports Triton, which only GPUs need.
    from .triton_attention import decode_attention_cuda

    _check(q, k, v, mask)
    return decode_attention_cuda(q, k, v, mask, scale, overlap)


@torch.library.register_fake("intscale::decode_attention")
def _decode_attention_fake(q, k, v, mask, scale, abi, overlap=False):
    _check(q, k, v, mask)
    return q.new_empty(q.shape)
