"""Lossless all-reduce of small and middle-sized messages, in one step or two, without flags.

Every rank writes its elements, two in a word of 32 bits, into memory of the other ranks that holds the empty word, a pattern of
two NaN that no rank sends. Who waits for a word looks at the word itself: no flag, no fence, no answer from the other GPU, and no
byte more than the elements (the protocol LL of NCCL sends a flag with each word, twice the bytes).

A launch takes one step of program ``b``, which writes into regions ``b`` of the other ranks only. A region has three sides, which
steps take in turn: while one is written and read, the side of the step before is emptied for the step after the next. A rank
writes into that two steps later, when it has seen what this rank sent one step later, in another launch than the emptying: so the
empty words are there. Steps are counted on the device, by threes: a captured graph can be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

WARPS = 4
WORDS = 512  # of two elements each, of a slice, that a program takes
MOST_ONE_SHOT = 1 << 20  # bytes of a launch
MOST_TWO_SHOT = 8 << 20
FILL = 255  # every byte of a workspace at first
SIDES: tl.constexpr = tl.constexpr(3)
EMPTY: tl.constexpr = tl.constexpr(-1)
OTHER_NAN: tl.constexpr = tl.constexpr(-32769)  # what is sent in place of the empty word: two NaN of another pattern


@dataclass(frozen=True)
class Form:
    """How a message is summed.

    Attributes:
        legs: how often an element is sent: 1 or 2 steps.
        slices: of a message; each is summed by one rank, or the only one by every rank.
        programs: of the longest launch.
    """

    legs: int
    slices: int
    programs: int

    @property
    def elements(self) -> int:
        """That a launch takes at most; larger messages take several."""
        return 2 * WORDS * self.programs * self.slices

    def workspace_bytes(self, ranks: int) -> int:
        """What its workspace needs, whatever the messages."""
        return 3 * self.legs * ranks * self.programs * WORDS * 4

    def slice_words(self, elements: int) -> int:
        """Words of each slice of so many elements: a multiple of 16, so that loads and stores are wide."""
        return -(-(elements // 2) // (16 * self.slices)) * 16

    def launched(self, elements: int) -> int:
        """Programs of a launch for so many elements."""
        return -(-self.slice_words(elements) // WORDS)


ONE_SHOT = Form(1, 1, MOST_ONE_SHOT // (4 * WORDS))


def two_shot(ranks: int) -> Form:
    """The form in two steps, with a slice for each rank."""
    return Form(2, ranks, MOST_TWO_SHOT // (4 * WORDS * ranks))


@triton.jit
def _region(
    own_ptr, offset, side, leg: tl.constexpr, source, block, LEGS: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Region ``block`` of a side and leg for words from rank ``source``, in the workspace ``offset`` bytes behind the own one."""
    words = (own_ptr + offset).to(tl.pointer_type(tl.int32), bitcast=True)
    return words + (((side * LEGS + leg) * RANKS + source) * PROGRAMS + block) * WORDS


@triton.jit
def _send(
    word, here, place, own_ptr, peers_ptr, peer, side, leg, block, LEGS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Words into the region that this rank has in the memory of rank ``peer``."""
    offset = tl.multiple_of(tl.load(peers_ptr + peer), 16)
    tl.store(_region(own_ptr, offset, side, leg, RANK, block, LEGS, RANKS, WORDS, PROGRAMS) + place, word, here)


@triton.jit
def _empty(
    own_ptr, side, leg: tl.constexpr, place, block, LEGS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Empty words into the regions that the other ranks filled in the step before this one."""
    before = tl.where(side == 0, SIDES - 1, side - 1)
    for k in tl.static_range(1, RANKS):
        old = _region(own_ptr, 0, before, leg, (RANK + k) % RANKS, block, LEGS, RANKS, WORDS, PROGRAMS)
        tl.store(old + place, tl.full((WORDS,), EMPTY, tl.int32))


@triton.jit
def _sendable(word):
    """The word, or other NaN in place of the empty word."""
    return tl.where(word == EMPTY, OTHER_NAN, word)


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """The two elements of an int32 word as fp32."""
    if dtype == tl.bfloat16:
        lo = (word << 16).to(tl.float32, bitcast=True)
        hi = (word & -65536).to(tl.float32, bitcast=True)
    else:
        lo = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        hi = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return lo, hi


@triton.jit
def _joined(lo, hi, dtype: tl.constexpr):
    """Two fp32 rounded to elements, in an int32 word."""
    low = lo.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    return low | (hi.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _sum(
    own, here, place, own_ptr, side, block, dtype: tl.constexpr, LEGS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Own words and what has come for this leg, summed over the ranks in their order, as words; and whether any is missing."""
    lo = tl.zeros((WORDS,), tl.float32)
    hi = lo
    empty = tl.zeros((WORDS,), tl.int32)
    for peer in tl.static_range(RANKS):
        word = own
        if peer != RANK:
            received = _region(own_ptr, 0, side, 0, peer, block, LEGS, RANKS, WORDS, PROGRAMS)
            word = tl.load(received + place, here, 0, volatile=True)
            empty |= (word == EMPTY).to(tl.int32)
        more_lo, more_hi = _halves(word, dtype)
        lo, hi = lo + more_lo, hi + more_hi
    return _sendable(_joined(lo, hi, dtype)), tl.max(empty, 0)


@triton.jit
def one_shot_kernel(
    x_ptr, out_ptr, own_ptr, peers_ptr, counts_ptr, words, LEGS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sum ``x``, 1-D bf16 or fp16 of ``2 * words`` elements, over the ranks in their order into ``out``, rounded once."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    block = tl.program_id(0)
    side = tl.load(counts_ptr + block)
    place = tl.arange(0, WORDS)
    index = block * WORDS + place
    here = index < words
    own = _sendable(tl.load(x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + index, here, 0))
    for k in tl.static_range(1, RANKS):
        peer = (RANK + k) % RANKS
        _send(own, here, place, own_ptr, peers_ptr, peer, side, 0, block, LEGS, RANK, RANKS, WORDS, PROGRAMS)
    _empty(own_ptr, side, 0, place, block, LEGS, RANK, RANKS, WORDS, PROGRAMS)
    missing = 1
    while missing != 0:  # what is there is summed and stored at once: no tensor leaves this loop
        total, missing = _sum(own, here, place, own_ptr, side, block, dtype, LEGS, RANK, RANKS, WORDS, PROGRAMS)
        tl.store(out_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + index, total, here)
    tl.store(counts_ptr + block, tl.where(side == SIDES - 1, 0, side + 1))


@triton.jit
def two_shot_kernel(
    x_ptr, out_ptr, own_ptr, peers_ptr, counts_ptr, words, length, LEGS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    WORDS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The bits of ``one_shot_kernel`` in two steps: rank ``r`` sums the words from ``r * length`` on and sends them to all."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    block = tl.program_id(0)
    side = tl.load(counts_ptr + block)
    xs = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    outs = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    place = tl.arange(0, WORDS)
    within = block * WORDS + place
    for k in tl.static_range(1, RANKS):
        peer = (RANK + k) % RANKS
        index = within + peer * length
        here = (within < length) & (index < words)
        word = _sendable(tl.load(xs + index, here, 0))
        _send(word, here, place, own_ptr, peers_ptr, peer, side, 0, block, LEGS, RANK, RANKS, WORDS, PROGRAMS)
    own_index = within + RANK * length
    own_here = (within < length) & (own_index < words)
    own = _sendable(tl.load(xs + own_index, own_here, 0))
    _empty(own_ptr, side, 0, place, block, LEGS, RANK, RANKS, WORDS, PROGRAMS)
    _empty(own_ptr, side, 1, place, block, LEGS, RANK, RANKS, WORDS, PROGRAMS)
    missing = 1
    while missing != 0:  # what is there is summed, stored and sent at once: no tensor leaves this loop
        total, missing = _sum(own, own_here, place, own_ptr, side, block, dtype, LEGS, RANK, RANKS, WORDS, PROGRAMS)
        if missing == 0:
            for k in tl.static_range(1, RANKS):
                peer = (RANK + k) % RANKS
                _send(
                    total, own_here, place, own_ptr, peers_ptr, peer, side, 1, block, LEGS, RANK, RANKS, WORDS, PROGRAMS
                )
            tl.store(outs + own_index, total, own_here)
    missing = 1
    while missing != 0:
        empty = tl.zeros((WORDS,), tl.int32)
        for k in tl.static_range(1, RANKS):
            index = within + (RANK + k) % RANKS * length
            here = (within < length) & (index < words)
            received = _region(own_ptr, 0, side, 1, (RANK + k) % RANKS, block, LEGS, RANKS, WORDS, PROGRAMS)
            word = tl.load(received + place, here, 0, volatile=True)
            empty |= (word == EMPTY).to(tl.int32)
            tl.store(outs + index, word, here)  # what has not come is overwritten
        missing = tl.max(empty, 0)
    tl.store(counts_ptr + block, tl.where(side == SIDES - 1, 0, side + 1))
