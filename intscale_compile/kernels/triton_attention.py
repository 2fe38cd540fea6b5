"""Triton kernel of ``intscale::decode_attention`` and its launcher."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch
from .split_k import take_counters

KEYS_PER_STEP = 64
# Parts of one sequence's keys, at most, powers of two: more cost more in partial results than they bring in parallel work. On an
# H100 64 parts took 1.06 to 1.24 times as long as 32 at 2048 and 8192 keys, 0.80 times at 32768.
FEW_PARTS, MOST_PARTS = 32, 64
MANY_KEYS = 16384  # above these, MOST_PARTS
DOT_ROWS = 16  # least number of rows of a tensor core product


@triton.jit
def attend(
    q, k_ptr, v_ptr, mask_ptr, first, begin, end, k_stride, v_stride, mask_stride, mask_head_stride, log2_scale,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    STEPS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Running maximum ``[ROWS]``, sum ``[ROWS]`` and weighted values fp32 ``[ROWS, BLOCK_D]`` of STEPS * BLOCK_L keys.

    Of these the ones from ``begin`` to before ``end`` are read, the others are hidden.
    """
    heads = tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in range(STEPS):
        keys = first + step * BLOCK_L + tl.arange(0, BLOCK_L)
        visible = (keys >= begin) & (keys < end)
        if MASK == "bool":  # one mask for all heads: hidden keys and values are not even read
            visible = visible & (tl.load(mask_ptr + keys * mask_stride, mask=visible, other=0) != 0)
        inside = visible[:, None] & (features < D)[None, :]
        offsets = keys[:, None].to(tl.int64)
        k = tl.load(k_ptr + offsets * k_stride + features[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + offsets * v_stride + features[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * log2_scale
        if MASK == "heads" or MASK == "float":
            rows = tl.where(heads < HEADS, heads, 0)
            ptrs = mask_ptr + rows[:, None] * mask_head_stride + keys[None, :] * mask_stride
            if MASK == "heads":
                scores = tl.where(tl.load(ptrs, mask=visible[None, :], other=0) != 0, scores, float("-inf"))
            else:  # powers of two below: log2(e) times what is added
                added = tl.load(ptrs, mask=visible[None, :], other=0.0).to(tl.float32)
                scores = scores + added * 1.4426950408889634
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(top - reference)
        total = total * shrink + tl.sum(p, 1)
        values = tl.dot(p.to(v.dtype), v, values * shrink[:, None])
        top = new_top
    return top, total, values


@triton.jit
def visible_range(mask_ptr, first, L, stride, KEYS: tl.constexpr):
    """First visible key among ``KEYS`` from ``first`` on, the end of the last one, and whether all between them are visible."""
    keys = first + tl.arange(0, KEYS)
    seen = tl.load(mask_ptr + keys * stride, mask=keys < L, other=0) != 0
    begin, end = tl.min(tl.where(seen, keys, L), 0), tl.max(tl.where(seen, keys + 1, 0), 0)
    return begin, end, tl.sum(seen.to(tl.int32), 0) >= end - begin


@triton.jit
def add_parts(
    partial_ptr, stats_ptr, slots, parts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Sum ``[ROWS]`` and weighted values ``[ROWS, BLOCK_D]`` over all parts of a key head.

    The parts' maxima first, all at once, then several parts at a time: one after the other, each would wait for its loads.
    """
    AT_ONCE: tl.constexpr = 8 if ROWS <= 4 else 16 // ROWS if ROWS < 16 else 1  # 32 rows of 8 heads spill on sm_80
    heads = tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    each = tl.arange(0, MOST)
    tops = tl.load(
        stats_ptr + (slots + each)[:, None] * (2 * HEADS) + heads[None, :],
        mask=(each < parts)[:, None] & (heads < HEADS)[None, :], other=float("-inf"), cache_modifier=".cg",
    )  # fmt: skip
    top = tl.max(tops, 0)
    reference = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, parts, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        there = (some < parts)[:, None] & (heads < HEADS)[None, :]
        stats = stats_ptr + (slots + some)[:, None] * (2 * HEADS) + heads[None, :]
        part_top = tl.load(stats, mask=there, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(stats + HEADS, mask=there, other=0.0, cache_modifier=".cg")
        rows = (slots + some)[:, None] * HEADS + heads[None, :]
        part_values = tl.load(
            partial_ptr + rows[:, :, None] * BLOCK_D + features[None, None, :],
            mask=there[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        shrink = tl.exp2(part_top - reference[None, :])
        total += tl.sum(shrink * part_total, 0)
        values += tl.sum(shrink[:, :, None] * part_values, 0)
    return total, values


@triton.jit
def store_rows(
    out_ptr, total, values, first_head, heads, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Divide by the sums and store the rows of one key head's query heads."""
    features = tl.arange(0, BLOCK_D)
    total = tl.where(total == 0.0, 1.0, total)  # nothing is visible: zeros, as in PyTorch
    y = (values / total[:, None]).to(out_ptr.dtype.element_ty)
    inside = (heads < HEADS)[:, None] & (features < D)[None, :]
    tl.store(out_ptr + (first_head + heads)[:, None] * D + features[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["L", "parts"])
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, partial_ptr, stats_ptr, counter_ptr, L, parts, key_heads, log2_scale,
    q_batch, q_head, k_batch, k_head, k_stride, v_batch, v_head, v_stride, mask_batch, mask_head, mask_stride,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    STEPS: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, OVERLAP: tl.constexpr, SUM_ROWS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one key head; with SPLIT the last part to arrive adds all of them up, MOST at most."""
    unit = tl.program_id(0)
    part = tl.program_id(1)
    batch = (unit // key_heads).to(tl.int64)
    head = unit % key_heads
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heads = tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    inside = (heads < HEADS)[:, None] & (features < D)[None, :]
    rows = (head * HEADS + heads)[:, None]
    q = tl.load(q_ptr + batch * q_batch + rows * q_head + features[None, :], mask=inside, other=0.0)
    ks, vs = k_ptr + batch * k_batch + head * k_head, v_ptr + batch * v_batch + head * v_head
    masks = mask_ptr + batch * mask_batch + head * HEADS * mask_head
    first = part * (STEPS * BLOCK_L)
    if MASK == "bool":
        begin, end, unbroken = visible_range(masks, first, L, mask_stride, STEPS * BLOCK_L)
        if unbroken:  # padding and the empty end of a cache: loads of keys wait for no load of the mask
            top, total, values = attend(
                q, ks, vs, masks, first, begin, end, k_stride, v_stride, mask_stride, mask_head, log2_scale,
                HEADS, ROWS, D, BLOCK_D, BLOCK_L, STEPS, "none",
            )  # fmt: skip
        else:
            top, total, values = attend(
                q, ks, vs, masks, first, begin, end, k_stride, v_stride, mask_stride, mask_head, log2_scale,
                HEADS, ROWS, D, BLOCK_D, BLOCK_L, STEPS, "bool",
            )  # fmt: skip
    else:
        top, total, values = attend(
            q, ks, vs, masks, first, 0, L, k_stride, v_stride, mask_stride, mask_head, log2_scale,
            HEADS, ROWS, D, BLOCK_D, BLOCK_L, STEPS, MASK,
        )  # fmt: skip
    if SPLIT:
        slots = unit.to(tl.int64) * parts
        value_ptrs = partial_ptr + heads[:, None] * BLOCK_D + features[None, :]
        stat_ptrs = stats_ptr + heads
        tl.store(value_ptrs + (slots + part) * (HEADS * BLOCK_D), values, mask=(heads < HEADS)[:, None])
        tl.store(stat_ptrs + (slots + part) * (2 * HEADS), top, mask=heads < HEADS)
        tl.store(stat_ptrs + (slots + part) * (2 * HEADS) + HEADS, total, mask=heads < HEADS)
        tl.debug_barrier()
        last = tl.atomic_add(counter_ptr + unit, 1, sem="acq_rel", scope="gpu") == parts - 1
        if last:
            tl.store(counter_ptr + unit, 0)
            few = tl.arange(0, SUM_ROWS)
            sums, y = add_parts(partial_ptr, stats_ptr, slots, parts, HEADS, SUM_ROWS, BLOCK_D, MOST)
            store_rows(out_ptr + batch * key_heads * HEADS * D, sums, y, head * HEADS, few, HEADS, D, BLOCK_D)
    else:
        store_rows(out_ptr + batch * key_heads * HEADS * D, total, values, head * HEADS, heads, HEADS, D, BLOCK_D)


def parts_of(keys: int) -> tuple[int, int]:
    """Number of parts that ``keys`` are cut into, and steps of :data:`KEYS_PER_STEP` in each."""
    steps = max(1, -(-keys // KEYS_PER_STEP))
    steps_per_part = triton.next_power_of_2(-(-steps // (FEW_PARTS if keys <= MANY_KEYS else MOST_PARTS)))
    return -(-steps // steps_per_part), steps_per_part


def _mask_kind(mask: Optional[Tensor]) -> str:
    if mask is None:
        return "none"
    if mask.dtype is not torch.bool:
        return "float"
    return "bool" if mask.stride(1) == 0 else "heads"


@functools.lru_cache(None)
def launch_options(mask: str, block_d: int, capability: Optional[tuple[int, int]]) -> dict[str, int]:
    """Warps and stages; ``capability``: of an NVIDIA GPU.

    Three stages of 128 features take 74 KiB of shared memory, which GPUs before sm_80 and AMD's do not have. Two warps and three
    stages took 0.72 to 0.94 of the time of four and two on an H100 (benchmarks/results/2026-11-27-h100-contexts.md).
    """
    deep = mask in ("none", "bool") and block_d <= 128 and capability is not None and capability >= (8, 0)
    return dict(num_warps=2, num_stages=3) if deep else dict(num_warps=4, num_stages=2)


@functools.lru_cache(None)
def _capability(device: torch.device) -> Optional[tuple[int, int]]:
    if device.type != "cuda":
        return 9, 0  # the interpreter, for which nothing depends on it
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


@functools.lru_cache(None)
def _can_overlap(device: torch.device) -> bool:
    return (_capability(device) or (0, 0)) >= (9, 0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def decode_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], scale: float, overlap: bool = False
) -> Tensor:
    """``intscale::decode_attention`` on checked operands; ``overlap`` begins while the kernel before still ends."""
    batch, query_heads, _, features = q.shape
    out = q.new_empty(q.shape)
    key_heads, keys = k.shape[1], k.shape[2]
    if out.numel() == 0:
        return out
    heads = query_heads // key_heads
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    if mask is not None:
        mask = mask.expand(batch, query_heads, 1, keys)
    parts, steps = parts_of(keys)
    block_d = max(16, triton.next_power_of_2(features))
    partial = stats = counters = None
    if parts > 1:
        partial = torch.empty(batch * query_heads * parts * block_d, dtype=torch.float32, device=q.device)
        stats = torch.empty(2 * batch * query_heads * parts, dtype=torch.float32, device=q.device)
        if q.is_cuda:
            counters = take_counters(q.device, batch * key_heads)
        else:  # the interpreter
            counters = torch.zeros(batch * key_heads, dtype=torch.int32)
    mask_strides = (0, 0, 0) if mask is None else (mask.stride(0), mask.stride(1), mask.stride(3))
    overlap = overlap and q.is_cuda and _can_overlap(q.device)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        launch(
            decode_attention_kernel, (batch * key_heads, parts),
            q, k, v, q if mask is None else mask, out, partial, stats, counters, keys, parts, key_heads,
            scale * math.log2(math.e), q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], *mask_strides,
            HEADS=heads, ROWS=max(DOT_ROWS, triton.next_power_of_2(heads)), D=features, BLOCK_D=block_d,
            BLOCK_L=KEYS_PER_STEP, STEPS=steps, MASK=_mask_kind(mask), SPLIT=parts > 1, OVERLAP=overlap,
            SUM_ROWS=triton.next_power_of_2(heads), MOST=MOST_PARTS,
            **launch_options(_mask_kind(mask), block_d, _capability(q.device)), **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out
