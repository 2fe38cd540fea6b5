"""``intscale::int_attention`` on a GPU: one Triton kernel with int8 tensor cores, the integers of ``attention.py`` to the bit.

Probabilities are rounded with the sum of their row, so that they cannot be rescaled as a running maximum rises: three passes
over the keys, for the maximum, the sum and the values. Scores are computed in each; they never go to memory. Probabilities
have two int8 digits and values, of at most 23 bits, three: six products, put together in int64.

A few queries with many keys (decoding) divide the keys among programs: a launch for each pass, whose maxima and sums meet in
memory. Integers may be added in any order.
"""

from __future__ import annotations

import contextlib
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch

FUSED = True  # False: PyTorch operators, with scores in memory
DIVIDED = True  # False: one program for all keys, also where there are few queries
MOST_KEYS = 1 << 17
MOST_FEATURES = 256
KEYS_PER_STEP = 64
FEW_ROWS = 16  # most rows of a query block whose keys are divided
PROGRAMS = 264  # that share the work then, about
HIDDEN = tl.constexpr(-(1 << 62))
NOTHING = tl.constexpr(1 << 20)  # 2 ** -16 with 15 fraction bits is 0


@triton.jit
def exponent_of(d):
    """Exponents of dyadic numbers, int64."""
    return (d + (1 << 17)) >> 18


@triton.jit
def scores_of(
    q, query, shift, times, mask_rows, k_ptr, scale_ptr, mask_ptr, first, S, k_stride, scale_stride, mask_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores int64 ``[ROWS, BLOCK_S]`` of the keys from ``first``, and which of them are seen."""
    keys = first + tl.arange(0, BLOCK_S)
    features = tl.arange(0, BLOCK_D)
    known = keys < S
    offsets = keys.to(tl.int64)
    k = tl.load(
        k_ptr + offsets[None, :] * k_stride + features[:, None], mask=known[None, :] & (features < D)[:, None], other=0
    )
    acc = tl.dot(q, k, out_dtype=tl.int32)
    d = tl.load(scale_ptr + offsets * scale_stride, mask=known, other=0).to(tl.int64)
    e = exponent_of(d)
    m = d - (e << 18)
    shifts = tl.minimum(tl.maximum(shift[:, None] + e[None, :], 1), 62)
    half = (shifts * 0 + 1) << (shifts - 1)
    s = (acc.to(tl.int64) * m[None, :] * query[:, None] + half) >> shifts
    seen = known[None, :] & (times >= 0)[:, None]
    if CAUSAL:
        seen = seen & (keys[None, :] <= times[:, None])
    if MASK:
        seen = seen & (tl.load(mask_ptr + mask_rows[:, None] + offsets[None, :] * mask_stride, mask=seen, other=0) != 0)
    return s, seen


@triton.jit
def exponentials(s, seen, top):
    """``2 ** (s - top)`` with 15 fraction bits, int32; 0 where nothing is seen."""
    z = tl.minimum(tl.maximum(top[:, None] - s, 0), NOTHING)
    z = tl.where(seen, z, NOTHING).to(tl.int32)
    r = (z & 0xFFFF) >> 1
    square = (r * r + (1 << 14)) >> 15
    y = (1 << 15) - ((22020 * r + (1 << 14)) >> 15) + ((5636 * square + (1 << 14)) >> 15)
    return tl.where(seen, y >> (z >> 16), 0)


@triton.jit
def digits(x):
    """``(low, high)`` of int32: ``low + 256 * high``, low in [-128, 127]."""
    low = ((x + 128) & 255) - 128
    return low, (x - low) >> 8


@triton.jit
def weighed(
    p, v_ptr, scale_ptr, first, S, v_stride, scale_stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Sum of probabilities int32 ``[ROWS, BLOCK_S]`` times values, int64 ``[ROWS, BLOCK_D]``."""
    keys = first + tl.arange(0, BLOCK_S)
    features = tl.arange(0, BLOCK_D)
    known = keys < S
    offsets = keys.to(tl.int64)
    inside = known[None, :] & (features < D)[:, None]
    v = tl.load(v_ptr + offsets[None, :] * v_stride + features[:, None], mask=inside, other=0).to(tl.int32)
    d = tl.load(scale_ptr + offsets * scale_stride, mask=known, other=0).to(tl.int64)
    e = exponent_of(d)
    m = (d - (e << 18)).to(tl.int32)
    shifts = tl.minimum(tl.maximum(e - 12, 1), 30).to(tl.int32)  # of at most 24 bits: beyond 30, all is 0
    half = (shifts * 0 + 1) << (shifts - 1)
    value = (v * m[None, :] + half[None, :]) >> shifts[None, :]
    v0, rest = digits(value)
    v1, v2 = digits(rest)
    p0, p1 = digits(p)
    p0, p1 = p0.to(tl.int8), p1.to(tl.int8)
    v0, v1, v2 = tl.trans(v0.to(tl.int8)), tl.trans(v1.to(tl.int8)), tl.trans(v2.to(tl.int8))
    t0 = tl.dot(p0, v0, out_dtype=tl.int32)  # below 2 ** 21 for 128 keys
    t1 = tl.dot(p1, v0, tl.dot(p0, v1, out_dtype=tl.int32), out_dtype=tl.int32)
    t2 = tl.dot(p1, v1, tl.dot(p0, v2, out_dtype=tl.int32), out_dtype=tl.int32)
    t3 = tl.dot(p1, v2, out_dtype=tl.int32)
    return (t0 + (t1 << 8)).to(tl.int64) + ((t2 + (t3 << 8)).to(tl.int64) << 16)


@triton.jit(do_not_specialize=["T", "S"])
def integer_attention_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, out_ptr, T, S, key_heads, c_m, c_k,
    q_b, q_h, q_t, qs_b, qs_h, qs_t, k_b, k_h, k_s, ks_b, ks_h, ks_s, v_b, v_h, v_s, vs_b, vs_h, vs_s, m_b, m_h, m_t, m_s,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """ROWS rows, a row being a query of one of the HEADS that share keys; queries of one time stand next to each other."""
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    shared = (tl.program_id(1) % key_heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < T * HEADS
    times = tl.where(valid, rows // HEADS, -1)
    head = shared * HEADS + rows % HEADS
    at = tl.maximum(times, 0).to(tl.int64)
    features = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (features < D)[None, :]
    q = tl.load(q_ptr + batch * q_b + (head * q_h + at * q_t)[:, None] + features[None, :], mask=inside, other=0)
    d = tl.load(q_scale_ptr + batch * qs_b + head * qs_h + at * qs_t, mask=valid, other=0).to(tl.int64)
    e = exponent_of(d)
    query, shift = ((d - (e << 18)) * c_m) >> 15, e + (c_k - 31)
    k_ptr += batch * k_b + shared * k_h
    k_scale_ptr += batch * ks_b + shared * ks_h
    v_ptr += batch * v_b + shared * v_h
    v_scale_ptr += batch * vs_b + shared * vs_h
    mask_rows = batch * m_b + head * m_h + at * m_t
    last = S
    if CAUSAL:
        last = tl.minimum(S, (tl.minimum((tl.program_id(0) + 1) * ROWS, T * HEADS) - 1) // HEADS + 1)
    top = tl.full([ROWS], HIDDEN, tl.int64)
    for first in range(0, last, BLOCK_S):
        s, seen = scores_of(
            q, query, shift, times, mask_rows, k_ptr, k_scale_ptr, mask_ptr, first, S, k_s, ks_s, m_s,
            D, BLOCK_D, BLOCK_S, CAUSAL, MASK,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(tl.where(seen, s, HIDDEN), 1))
    total = tl.zeros([ROWS], tl.int64)
    for first in range(0, last, BLOCK_S):
        s, seen = scores_of(
            q, query, shift, times, mask_rows, k_ptr, k_scale_ptr, mask_ptr, first, S, k_s, ks_s, m_s,
            D, BLOCK_D, BLOCK_S, CAUSAL, MASK,
        )  # fmt: skip
        total += tl.sum(exponentials(s, seen, top), 1).to(tl.int64)
    # rdiv(e << 14, total) by the inverse of 2 total: the estimate is the quotient or one less.
    total = tl.maximum(total, 1)
    double = total * 2
    inverse = (total * 0 + (1 << 46)) // tl.maximum(double, 1 << 16)
    acc = tl.zeros([ROWS, BLOCK_D], tl.int64)
    for first in range(0, last, BLOCK_S):
        s, seen = scores_of(
            q, query, shift, times, mask_rows, k_ptr, k_scale_ptr, mask_ptr, first, S, k_s, ks_s, m_s,
            D, BLOCK_D, BLOCK_S, CAUSAL, MASK,
        )  # fmt: skip
        n = (exponentials(s, seen, top).to(tl.int64) << 15) + total[:, None]
        p = (n * inverse[:, None]) >> 46
        p += tl.where(n - p * double[:, None] >= double[:, None], 1, 0)
        acc += weighed(p.to(tl.int32), v_ptr, v_scale_ptr, first, S, v_s, vs_s, D, BLOCK_D, BLOCK_S)
    y = tl.minimum(tl.maximum((acc + (1 << 9)) >> 10, -2147483648), 2147483647).to(tl.int32)
    place = ((batch * key_heads * HEADS + head) * T + at) * D
    tl.store(out_ptr + place[:, None] + features[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["T", "S", "steps"])
def divided_attention_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, mask_ptr, out_ptr, top_ptr, total_ptr, acc_ptr, T, S, steps,
    key_heads, c_m, c_k,
    q_b, q_h, q_t, qs_b, qs_h, qs_t, k_b, k_h, k_s, ks_b, ks_h, ks_s, v_b, v_h, v_s, vs_b, vs_h, vs_s, m_b, m_h, m_t, m_s,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """One pass over ``steps`` blocks of keys, of one block of rows: 0 the maximum, 1 the sum, 2 the values; 3 rounds them.

    Maxima (less HIDDEN, so that zeros are below all of them), sums and values of all rows are int64 in memory, zeros at first.
    """
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    shared = (tl.program_id(1) % key_heads).to(tl.int64)
    rows = tl.arange(0, ROWS)
    valid = rows < T * HEADS
    times = tl.where(valid, rows // HEADS, -1)
    head = shared * HEADS + rows % HEADS
    at = tl.maximum(times, 0).to(tl.int64)
    features = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (features < D)[None, :]
    slots = tl.program_id(1).to(tl.int64) * ROWS + rows
    places = slots[:, None] * BLOCK_D + features[None, :]
    if PASS == 3:
        y = (tl.load(acc_ptr + places) + (1 << 9)) >> 10
        y = tl.minimum(tl.maximum(y, -2147483648), 2147483647).to(tl.int32)
        place = ((batch * key_heads * HEADS + head) * T + at) * D
        tl.store(out_ptr + place[:, None] + features[None, :], y, mask=inside)
    else:
        q = tl.load(q_ptr + batch * q_b + (head * q_h + at * q_t)[:, None] + features[None, :], mask=inside, other=0)
        d = tl.load(q_scale_ptr + batch * qs_b + head * qs_h + at * qs_t, mask=valid, other=0).to(tl.int64)
        e = exponent_of(d)
        query, shift = ((d - (e << 18)) * c_m) >> 15, e + (c_k - 31)
        k_ptr += batch * k_b + shared * k_h
        k_scale_ptr += batch * ks_b + shared * ks_h
        v_ptr += batch * v_b + shared * v_h
        v_scale_ptr += batch * vs_b + shared * vs_h
        mask_rows = batch * m_b + head * m_h + at * m_t
        found = tl.zeros([ROWS], tl.int64)
        acc = tl.zeros([ROWS, BLOCK_D], tl.int64)
        if PASS > 0:
            top = tl.load(top_ptr + slots) + HIDDEN
        if PASS == 2:
            total = tl.maximum(tl.load(total_ptr + slots), 1)
            double = total * 2
            inverse = (total * 0 + (1 << 46)) // tl.maximum(double, 1 << 16)
        for step in range(0, steps):
            first = (tl.program_id(0) * steps + step) * BLOCK_S
            s, seen = scores_of(
                q, query, shift, times, mask_rows, k_ptr, k_scale_ptr, mask_ptr, first, S, k_s, ks_s, m_s,
                D, BLOCK_D, BLOCK_S, CAUSAL, MASK,
            )  # fmt: skip
            if PASS == 0:
                found = tl.maximum(found, tl.max(tl.where(seen, s - HIDDEN, 0), 1))
            if PASS == 1:
                found += tl.sum(exponentials(s, seen, top), 1).to(tl.int64)
            if PASS == 2:
                n = (exponentials(s, seen, top).to(tl.int64) << 15) + total[:, None]
                p = (n * inverse[:, None]) >> 46
                p += tl.where(n - p * double[:, None] >= double[:, None], 1, 0)
                acc += weighed(p.to(tl.int32), v_ptr, v_scale_ptr, first, S, v_s, vs_s, D, BLOCK_D, BLOCK_S)
        if PASS == 0:
            tl.atomic_max(top_ptr + slots, found, mask=valid)
        if PASS == 1:
            tl.atomic_add(total_ptr + slots, found, mask=valid)
        if PASS == 2:
            tl.atomic_add(acc_ptr + places, acc, mask=inside)


def attention_gpu(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, mask: Optional[Tensor], causal: bool,
    c_m: int, c_k: int,
) -> Optional[Tensor]:  # fmt: skip
    """Arguments and result as of ``int_attention``, on a GPU; None where there are too many keys or features."""
    (batch, heads, tokens, features), (shared, keys) = q.shape, k.shape[1:3]
    if not FUSED or not q.numel() or not 0 < keys <= MOST_KEYS or features > MOST_FEATURES:
        return None
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=torch.int32, device=q.device)
    shown = None if mask is None else mask.expand(batch, heads, tokens, keys)
    strides = [stride for x in (q, q_scale, k, k_scale, v, v_scale) for stride in x.stride()[:3]]
    strides += (0, 0, 0, 0) if shown is None else shown.stride()
    rows, units = heads // shared * tokens, batch * shared
    operands = (q, q_scale, k, k_scale, v, v_scale, q if shown is None else shown, out)
    form = {"HEADS": heads // shared, "D": features, "BLOCK_D": max(32, triton.next_power_of_2(features))}
    form |= {"BLOCK_S": KEYS_PER_STEP, "CAUSAL": causal, "MASK": shown is not None, "num_stages": 2}
    parts = min(triton.cdiv(keys, KEYS_PER_STEP), PROGRAMS // units) if DIVIDED and rows <= FEW_ROWS else 1
    context: Any = torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
    with context:
        if parts > 1:
            _divided(operands, (tokens, keys), (shared, c_m, c_k, *strides), form, units, parts)
            return out
        block = 64 if rows > 32 else 16
        launch(
            integer_attention_kernel, (triton.cdiv(rows, block), units), *operands, tokens, keys, shared, c_m, c_k, *strides,
            ROWS=block, num_warps=8 if features > 64 and block > 16 else 4, **form,
        )  # fmt: skip
    return out


def _divided(operands: tuple, sizes: tuple, others: tuple, form: dict[str, Any], units: int, parts: int) -> None:
    """The passes, one launch each; ``parts`` programs share the keys of each of ``units`` batches and key heads."""
    slots = units * FEW_ROWS
    memory = torch.zeros(slots * (2 + form["BLOCK_D"]), dtype=torch.int64, device=operands[0].device)
    steps = triton.cdiv(triton.cdiv(sizes[1], KEYS_PER_STEP), parts)
    arguments = (*operands, memory, memory[slots:], memory[2 * slots :], *sizes, steps, *others)
    for number in range(4):
        grid = (parts if number < 3 else 1, units)
        launch(divided_attention_kernel, grid, *arguments, ROWS=FEW_ROWS, PASS=number, num_warps=4, **form)
