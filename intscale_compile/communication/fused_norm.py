"""``intscale::all_reduce_norm_quantize``: an all-reduce of few rows with residual, RMSNorm and int8 quantization after it.

On symmetric memory it is one kernel (``norm_kernel``). Elsewhere it is the plain collective and the same arithmetic in PyTorch.
"""

from __future__ import annotations

import logging
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from ..reasons import log_once
from . import symmetric
from .agreement import agree
from .ops import no_gradient, resolve
from .planned import PLANNED_ALL_REDUCE, reason_against

MOST_ROWS = 64
MOST_FEATURES = 8192
SMALLEST = 2.0**-100

torch.library.define(
    "intscale::all_reduce_norm_quantize",
    "(Tensor x, Tensor residual, Tensor weight, float eps, str group_name) -> (Tensor, Tensor, Tensor)",
)
ALL_REDUCE_NORM_QUANTIZE = torch.ops.intscale.all_reduce_norm_quantize.default


def fits(x: Tensor) -> bool:
    """Whether the kernel takes a tensor of this shape and dtype: rows of 16-bit elements, an even number of them."""
    sizes = (x.numel(), x.shape[-1]) if x.dim() else (0, 0)
    if not all(isinstance(n, int) for n in sizes) or not x.numel() or x.dtype not in symmetric.LOSSLESS_DTYPES:
        return False
    return x.shape[-1] % 32 == 0 and x.shape[-1] <= MOST_FEATURES and x.numel() // x.shape[-1] <= MOST_ROWS


@torch.library.impl("intscale::all_reduce_norm_quantize", "CompositeExplicitAutograd")
def _all_reduce_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    group = resolve(group_name)
    if reason_against(x, group) is None and fits(x):
        agree("all_reduce_norm_quantize", x, "one_shot", group)
        found = _in_one_kernel(x, residual, weight, eps, group)
        if found is not None:
            return found
        log_once(logging.INFO, "all_reduce with RMSNorm: symmetric memory is not used between these ranks")
    return norm_quantize(PLANNED_ALL_REDUCE(x, "0:plain", group_name), residual, weight, eps)


def norm_quantize(total: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the sum, in PyTorch: ``residual + total``, and its RMSNorm as int8 with a scale for each row."""
    added = residual + total
    values = added.float()
    normed = (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)).to(added.dtype)
    values = (weight * normed).float()
    largest = values.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    codes = torch.round(values * (largest.reciprocal() * 127.0)).clamp(-127.0, 127.0).to(torch.int8)
    scale = torch.where(largest < float("inf"), largest * 0.007874015748031496, float("nan"))
    return added, codes, scale


def _in_one_kernel(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    # Imports Triton, which only GPUs need.
    from .norm_kernel import MOST_PROGRAMS, MOST_WORDS, all_reduce_norm_kernel, block, workspace_bytes

    ranks, features = group.size(), x.shape[-1]
    space = symmetric.fixed_workspace(group, x.device, "norm", workspace_bytes(ranks), MOST_PROGRAMS)
    if space is None:
        return None
    flat, residual, weight = (_aligned(part) for part in (x, residual, weight))
    rows = flat.numel() // features
    size, warps = block(features // 2)
    added, codes = torch.empty_like(flat), torch.empty_like(flat, dtype=torch.int8)
    scale = flat.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    with torch.cuda.device(x.device):
        symmetric.follow(space)
        all_reduce_norm_kernel[(min(rows, MOST_PROGRAMS),)](
            flat, residual, weight, added, codes, scale, space.buffer, space.peers, space.counts, rows,
            -(-rows // MOST_PROGRAMS), eps, HALF=features // 2, BLOCK=size, WORDS=MOST_WORDS, RANK=group.rank(), RANKS=ranks,
            PROGRAMS=MOST_PROGRAMS, num_warps=warps, maxnreg=min(255, 65536 // (32 * warps)), enable_fp_fusion=False,
        )  # fmt: skip
    return added, codes, scale


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, at an address of whole words."""
    x = x.detach().contiguous()
    return x if x.data_ptr() % 4 == 0 else x.clone()


@torch.library.register_fake("intscale::all_reduce_norm_quantize")
def _fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int8), scale


torch.library.register_autograd("intscale::all_reduce_norm_quantize", no_gradient)
