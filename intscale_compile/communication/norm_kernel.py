"""The lossless all-reduce of few rows with what follows it in a layer, residual, RMSNorm and quantization, as one kernel.

The exchange is that of ``one_shot_kernel``: words of two elements that carry the number of their step. A program takes a row, in
one region of the workspace, so that it can sum over all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .one_shot_kernel import halves, joined, slot

MOST_WORDS = 4096  # of two elements each, in a row
MOST_PROGRAMS = 64  # rows at a time
ROUNDER: tl.constexpr = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: added and subtracted it rounds to an integer, ties to even
SMALLEST: tl.constexpr = tl.constexpr(
    2.0**-100
)  # of the largest magnitude of a row, as where activations are quantized


def workspace_bytes(ranks: int) -> int:
    """What the workspace needs, whatever the messages."""
    return 2 * ranks * MOST_PROGRAMS * MOST_WORDS * 8


def block(words: int) -> tuple[int, int]:
    """Words of a program, a power of two, and its warps: eight words for a thread, four where there are few."""
    size = max(128, triton.next_power_of_2(words))
    return size, max(4, min(16, size // 256))


@triton.jit
def _quantized(lo, hi, here, place, codes_ptr, scale_ptr):
    """A row of normalized elements as int8 with one scale; a row with NaN or Inf gets NaN for its scale."""
    largest = tl.max(tl.where(here, tl.maximum(tl.abs(lo), tl.abs(hi)), 0.0), 0)
    bad = tl.sum(tl.where(here, lo * 0.0 + hi * 0.0, 0.0), 0) != 0.0
    largest = tl.maximum(largest, SMALLEST)
    inverse = tl.div_rn(1.0, largest) * 127.0
    low = tl.minimum(tl.maximum((lo * inverse + ROUNDER) - ROUNDER, -127.0), 127.0).to(tl.int32)
    high = tl.minimum(tl.maximum((hi * inverse + ROUNDER) - ROUNDER, -127.0), 127.0).to(tl.int32)
    codes = codes_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    tl.store(codes + place, ((low & 255) | (high << 8)).to(tl.int16), here)
    tl.store(scale_ptr, tl.where(bad, float("nan"), largest * 0.007874015748031496))


@triton.jit(do_not_specialize=["rows", "rounds", "eps"])
def all_reduce_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, codes_ptr, scale_ptr, own_ptr, peers_ptr, counts_ptr, rows, rounds, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """``sum = residual + x summed over the ranks`` and its RMSNorm in int8: ``[rows, 2 * HALF]``; scales ``[rows]``."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    program = tl.program_id(0)
    done = tl.load(counts_ptr + program)
    xs = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    residuals = residual_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    weights = weight_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    sums = sum_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    own_words = own_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    place = tl.arange(0, BLOCK)
    for i in range(rounds):
        step = done + i + 1
        side = (step & 1) * RANKS
        number = i * tl.num_programs(0) + program
        here = place < tl.where(number < rows, HALF, 0)
        row = tl.cast(number, tl.int64)
        first = row * HALF
        own = tl.load(xs + first + place, here, 0)
        sent = (own.to(tl.int64) & 0xFFFFFFFF) | (step.to(tl.int64) << 32)
        for k in tl.static_range(1, RANKS):
            there = slot(own_ptr, peers_ptr, (RANK + k) % RANKS, side + RANK, program, WORDS, PROGRAMS)
            tl.store(there + place, sent, here)
        residual = tl.load(residuals + first + place, here, 0)
        weight = tl.load(weights + place, place < HALF, 0)
        missing = 1
        while missing != 0:
            lo = tl.zeros((BLOCK,), tl.float32)
            hi = lo
            wrong = tl.zeros((BLOCK,), tl.int32)
            for peer in tl.static_range(RANKS):
                word = own
                if peer != RANK:
                    received = own_words + ((side + peer) * PROGRAMS + program) * WORDS
                    numbered = tl.load(received + place, here, 0, volatile=True)
                    word = numbered.to(tl.int32)
                    wrong |= (numbered >> 32).to(tl.int32) ^ step
                more_lo, more_hi = halves(word, dtype)
                lo, hi = lo + more_lo, hi + more_hi
            missing = tl.max((here & (wrong != 0)).to(tl.int32), 0)
            if (missing == 0) & (number < rows):  # within this pass through the loop: no tensor leaves it
                more_lo, more_hi = halves(residual, dtype)
                lo, hi = halves(joined(lo, hi, dtype), dtype)
                word = joined(more_lo + lo, more_hi + hi, dtype)
                tl.store(sums + first + place, word, here)
                lo, hi = halves(word, dtype)
                mean = tl.sum(tl.where(here, lo * lo + hi * hi, 0.0), 0) * (1.0 / (2 * HALF))
                factor = tl.rsqrt(mean + eps)
                lo, hi = halves(joined(lo * factor, hi * factor, dtype), dtype)
                more_lo, more_hi = halves(weight, dtype)
                lo, hi = halves(joined(more_lo * lo, more_hi * hi, dtype), dtype)
                _quantized(lo, hi, here, place, codes_ptr + row * (2 * HALF), scale_ptr + row)
    tl.store(counts_ptr + program, done + rounds)
