"""The lossless all-reduce of small messages: one exchange, every rank sums everything, as one kernel on symmetric memory.

Each rank writes its elements straight into the memory of every other rank, each word of two elements together with the number of
the step in one store of eight bytes, which the memory takes whole. Who waits for a word looks at its number: there is no flag, no
fence and no answer from the other GPU, which is what small messages spend their time on (the protocol LL of NCCL). A message
takes twice its bytes.

Program ``b`` writes into region ``b`` of the other ranks' memory only, and waits for program ``b`` of each of them in every
step, so a region of two slots is enough: a rank that has come to step ``n + 2`` has seen all of step ``n + 1`` from every rank,
and those had read all of step ``n`` before they sent it. Steps are counted on the device: a captured graph can be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl

WARPS = 4
WORDS = 512  # of two elements each, that a program takes in a step: four for a thread, so that eight ranks fit its registers
MOST_PROGRAMS = 256


def workspace_bytes(ranks: int) -> int:
    """What the workspace needs, whatever the messages."""
    return 2 * ranks * MOST_PROGRAMS * WORDS * 8


def programs(elements: int) -> int:
    """Of a launch for so many elements."""
    return min(-(-elements // (2 * WORDS)), MOST_PROGRAMS)


@triton.jit
def slot(own_ptr, peers_ptr, peer, source, region, WORDS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Words of region ``region`` from rank ``source`` in the memory of ``peer``, as this rank reaches it."""
    words = (own_ptr + tl.multiple_of(tl.load(peers_ptr + peer), 16)).to(tl.pointer_type(tl.int64), bitcast=True)
    return words + (source * PROGRAMS + region) * WORDS


@triton.jit
def halves(word, dtype: tl.constexpr):
    """The two elements of an int32 word as fp32."""
    if dtype == tl.bfloat16:
        lo = (word << 16).to(tl.float32, bitcast=True)
        hi = (word & -65536).to(tl.float32, bitcast=True)
    else:
        lo = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        hi = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return lo, hi


@triton.jit
def joined(lo, hi, dtype: tl.constexpr):
    """Two fp32 rounded to elements, in an int32 word."""
    low = lo.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    return low | (hi.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["rounds"])
def one_shot_kernel(
    x_ptr, out_ptr, own_ptr, peers_ptr, counts_ptr, words, rounds, RANK: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sum ``x``, 1-D bf16 or fp16 of ``2 * words`` elements, over the ranks in their order into ``out``, rounded once."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    block = tl.program_id(0)
    done = tl.load(counts_ptr + block)
    xs = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    outs = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    own_words = own_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    place = tl.arange(0, WORDS)
    for i in range(rounds):
        step = done + i + 1
        side = (step & 1) * RANKS
        index = (i * tl.num_programs(0) + block) * WORDS + place
        here = index < words
        own = tl.load(xs + index, here, 0)
        sent = (own.to(tl.int64) & 0xFFFFFFFF) | (step.to(tl.int64) << 32)
        for k in tl.static_range(1, RANKS):
            there = slot(own_ptr, peers_ptr, (RANK + k) % RANKS, side + RANK, block, WORDS, PROGRAMS)
            tl.store(there + place, sent, here)
        missing = 1
        while missing != 0:  # what is there is summed and stored at once: no tensor leaves this loop
            lo = tl.zeros((WORDS,), tl.float32)
            hi = lo
            wrong = tl.zeros((WORDS,), tl.int32)
            for peer in tl.static_range(RANKS):
                word = own
                if peer != RANK:
                    received = own_words + ((side + peer) * PROGRAMS + block) * WORDS
                    numbered = tl.load(received + place, here, 0, volatile=True)
                    word = numbered.to(tl.int32)
                    wrong |= (numbered >> 32).to(tl.int32) ^ step
                more_lo, more_hi = halves(word, dtype)
                lo, hi = lo + more_lo, hi + more_hi
            tl.store(outs + index, joined(lo, hi, dtype), here & (wrong == 0))
            missing = tl.max((here & (wrong != 0)).to(tl.int32), 0)
    tl.store(counts_ptr + block, done + rounds)
