"""Lossless all-reduce of middle-sized messages in two steps, without flags: a word that has come is not the empty word.

Every rank writes its elements, two in a word of 32 bits, into memory of the other ranks that holds the empty word, a pattern of
two NaN that no rank sends. Who waits for a word looks at the word itself: no flag, no fence, no answer from the other GPU, and no
byte more than the elements (in place of the numbers that ``one_shot_kernel`` sends with each word).

A launch takes one step. Program ``b`` writes into regions ``b`` of the other ranks only. A region has three sides, which steps
take in turn: while one is written and read, the side of the step before is emptied for the step after the next. A rank writes
into it two steps later, when it has seen what this rank sent one step later, in another launch than the emptying: so the empty
words are there. Steps are counted on the device, by threes: a captured graph can be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .one_shot_kernel import halves, joined

WARPS = 4
WORDS = 512  # of two elements each, of a slice, that a program takes
MOST_PROGRAMS = 256
SIDES: tl.constexpr = tl.constexpr(3)
EMPTY: tl.constexpr = tl.constexpr(-1)
OTHER_NAN: tl.constexpr = tl.constexpr(-32769)  # what is sent in place of the empty word: two NaN of another pattern


def workspace_bytes(ranks: int) -> int:
    """What the workspace needs, whatever the messages; all its bytes are 255 at first."""
    return 3 * 2 * ranks * MOST_PROGRAMS * WORDS * 4


def slice_words(elements: int, ranks: int) -> int:
    """Words of a rank's slice: a multiple of 16, so that its loads and stores are wide."""
    return -(-(elements // 2) // (16 * ranks)) * 16


def programs(elements: int, ranks: int) -> int:
    """Of a launch for so many elements; more than ``MOST_PROGRAMS``: too many elements."""
    return -(-slice_words(elements, ranks) // WORDS)


@triton.jit
def _region(
    own_ptr, offset, side, leg, source, block, RANKS: tl.constexpr, WORDS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Region ``block`` of a side and leg for words from rank ``source``, ``offset`` bytes behind the own workspace."""
    words = (own_ptr + offset).to(tl.pointer_type(tl.int32), bitcast=True)
    return words + (((side * 2 + leg) * RANKS + source) * PROGRAMS + block) * WORDS


@triton.jit
def _sendable(word):
    """The word, or other NaN in place of the empty word."""
    return tl.where(word == EMPTY, OTHER_NAN, word)


@triton.jit
def two_shot_kernel(
    x_ptr, out_ptr, own_ptr, peers_ptr, counts_ptr, words, length, RANK: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sum ``x``, 1-D bf16 or fp16 of ``2 * words`` elements, over the ranks in their order into ``out``, rounded once.

    Rank ``r`` sums the words from ``r * length`` on.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    block = tl.program_id(0)
    side = tl.load(counts_ptr + block)
    before = tl.where(side == 0, SIDES - 1, side - 1)
    xs = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    outs = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    place = tl.arange(0, WORDS)
    within = block * WORDS + place
    for k in tl.static_range(1, RANKS):
        index = within + (RANK + k) % RANKS * length
        here = (within < length) & (index < words)
        offset = tl.multiple_of(tl.load(peers_ptr + (RANK + k) % RANKS), 16)
        there = _region(own_ptr, offset, side, 0, RANK, block, RANKS, WORDS, PROGRAMS)
        tl.store(there + place, _sendable(tl.load(xs + index, here, 0)), here)
    own_index = within + RANK * length
    own_here = (within < length) & (own_index < words)
    own = _sendable(tl.load(xs + own_index, own_here, 0))
    for k in tl.static_range(1, RANKS):
        for leg in tl.static_range(2):
            old = _region(own_ptr, 0, before, leg, (RANK + k) % RANKS, block, RANKS, WORDS, PROGRAMS)
            tl.store(old + place, tl.full((WORDS,), EMPTY, tl.int32))
    missing = 1
    while missing != 0:  # what is there is summed, stored and sent at once: no tensor leaves this loop
        lo = tl.zeros((WORDS,), tl.float32)
        hi = lo
        wrong = tl.zeros((WORDS,), tl.int32)
        for peer in tl.static_range(RANKS):
            word = own
            if peer != RANK:
                received = _region(own_ptr, 0, side, 0, peer, block, RANKS, WORDS, PROGRAMS)
                word = tl.load(received + place, own_here, 0, volatile=True)
                wrong |= (word == EMPTY).to(tl.int32)
            more_lo, more_hi = halves(word, dtype)
            lo, hi = lo + more_lo, hi + more_hi
        missing = tl.max(wrong, 0)
        if missing == 0:
            total = _sendable(joined(lo, hi, dtype))
            for k in tl.static_range(1, RANKS):
                offset = tl.multiple_of(tl.load(peers_ptr + (RANK + k) % RANKS), 16)
                there = _region(own_ptr, offset, side, 1, RANK, block, RANKS, WORDS, PROGRAMS)
                tl.store(there + place, total, own_here)
            tl.store(outs + own_index, total, own_here)
    missing = 1
    while missing != 0:
        wrong = tl.zeros((WORDS,), tl.int32)
        for k in tl.static_range(1, RANKS):
            index = within + (RANK + k) % RANKS * length
            here = (within < length) & (index < words)
            received = _region(own_ptr, 0, side, 1, (RANK + k) % RANKS, block, RANKS, WORDS, PROGRAMS)
            word = tl.load(received + place, here, 0, volatile=True)
            wrong |= (word == EMPTY).to(tl.int32)
            tl.store(outs + index, word, here)  # what has not come is overwritten
        missing = tl.max(wrong, 0)
    tl.store(counts_ptr + block, tl.where(side == SIDES - 1, 0, side + 1))


@triton.jit
def one_shot_word_kernel(
    x_ptr, out_ptr, own_ptr, peers_ptr, counts_ptr, words, RANK: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The same in one step."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    block = tl.program_id(0)
    side = tl.load(counts_ptr + block)
    before = tl.where(side == 0, SIDES - 1, side - 1)
    xs = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    outs = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    place = tl.arange(0, WORDS)
    index = block * WORDS + place
    here = index < words
    own = _sendable(tl.load(xs + index, here, 0))
    for k in tl.static_range(1, RANKS):
        offset = tl.multiple_of(tl.load(peers_ptr + (RANK + k) % RANKS), 16)
        there = _region(own_ptr, offset, side, 0, RANK, block, RANKS, WORDS, PROGRAMS)
        tl.store(there + place, own, here)
    for k in tl.static_range(1, RANKS):
        old = _region(own_ptr, 0, before, 0, (RANK + k) % RANKS, block, RANKS, WORDS, PROGRAMS)
        tl.store(old + place, tl.full((WORDS,), EMPTY, tl.int32))
    missing = 1
    while missing != 0:
        lo = tl.zeros((WORDS,), tl.float32)
        hi = lo
        wrong = tl.zeros((WORDS,), tl.int32)
        for peer in tl.static_range(RANKS):
            word = own
            if peer != RANK:
                received = _region(own_ptr, 0, side, 0, peer, block, RANKS, WORDS, PROGRAMS)
                word = tl.load(received + place, here, 0, volatile=True)
                wrong |= (word == EMPTY).to(tl.int32)
            more_lo, more_hi = halves(word, dtype)
            lo, hi = lo + more_lo, hi + more_hi
        tl.store(outs + index, joined(lo, hi, dtype), here & (wrong == 0))
        missing = tl.max(wrong, 0)
    tl.store(counts_ptr + block, tl.where(side == SIDES - 1, 0, side + 1))
