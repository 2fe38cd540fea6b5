"""The quantized all-reduce with 8-bit codes, without flags: four codes are a word, and a word says itself that it has come.

The protocol of ``word_kernels``: every rank writes into memory of the other ranks that holds the empty word, all bits set. No
code is 255 (``message.largest_code``) and no parameter has all bits set, so no rank sends that word. Steps, regions and their
sides are as there; a launch takes a range of groups of every slice, so each group is summed by the same rank as in
``reference.py``.

A region holds ``GROUPS`` groups: words of codes, then a word for each group of its scale and its minimum, bf16 both. The words
``2 * i`` and ``2 * i + 1`` of a group hold its elements from ``4 * i`` on and those from ``64 + 4 * i`` on.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .message import GROUP_SIZE
from .triton_kernels import MAGIC, _as_bf16, _bounds, _code_value, _parameters, _valid
from .word_kernels import EMPTY, SIDES

WARPS = 4
GROUPS = 16  # of a slice, that a program takes
# Elements of a launch, the least of these that holds the message: a launch ends when the last word has come, which takes 8 us, so
# large messages take large launches, whose workspaces are large.
ELEMENTS = (1 << 20, 8 << 20, 32 << 20)
HALF: tl.constexpr = tl.constexpr(GROUP_SIZE // 2)
LANES: tl.constexpr = tl.constexpr(GROUP_SIZE // 8)  # that hold a group: four elements of each half
WORDS: tl.constexpr = tl.constexpr(GROUP_SIZE // 4)  # of codes of a group


@dataclass(frozen=True)
class CodeForm:
    """How a message in code words is summed.

    Attributes:
        ranks: each sums a slice.
        programs: of the longest launch.
    """

    ranks: int
    programs: int

    @property
    def groups(self) -> int:
        """Of a slice, that a launch takes at most; larger slices take several."""
        return GROUPS * self.programs

    @property
    def workspace_bytes(self) -> int:
        """What its workspace needs, whatever the messages."""
        return 4 * 3 * 2 * self.ranks * self.groups * (GROUP_SIZE // 4 + 1)

    def launched(self, groups: int) -> int:
        """Programs of a launch where so many groups of a slice are left."""
        return min(-(-groups // GROUPS), self.programs)


def code_form(elements: int, ranks: int) -> CodeForm:
    """The form for a message of so many elements."""
    launched = next((most for most in ELEMENTS if elements <= most), ELEMENTS[-1])
    return CodeForm(ranks, -(-launched // (ranks * GROUPS * GROUP_SIZE)))


@triton.jit
def _least(a, b):
    """The smaller one, NaN where one of them is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _of_groups(x, LEAST: tl.constexpr, GROUPS: tl.constexpr):
    """The least or the largest of each group of ``[GROUPS * LANES, 4]``, at each of its lanes."""
    if LEAST:
        found = tl.reduce(tl.reshape(tl.reduce(x, 1, _least), (GROUPS, LANES)), 1, _least)
    else:
        found = tl.max(tl.reshape(tl.max(x, 1), (GROUPS, LANES)), 1)
    return tl.reshape(tl.broadcast_to(found[:, None], (GROUPS, LANES)), (GROUPS * LANES,))


@triton.jit
def _index(GROUPS: tl.constexpr):
    """Places of the elements of the first halves of groups, four of each lane: ``[GROUPS * LANES, 4]``."""
    lane = tl.arange(0, GROUPS * LANES)
    return (lane // LANES * (2 * HALF) + lane % LANES * 4)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _load(x, valid, GROUPS: tl.constexpr):
    """fp32 halves ``[GROUPS * LANES, 4]`` of the elements at ``x``; zeros from ``valid`` on."""
    index = _index(GROUPS)
    if valid == GROUPS * 2 * HALF:
        lo, hi = tl.load(x + index).to(tl.float32), tl.load(x + index + HALF).to(tl.float32)
    else:
        lo = tl.load(x + index, index < valid, 0.0).to(tl.float32)
        hi = tl.load(x + index + HALF, index + HALF < valid, 0.0).to(tl.float32)
    return lo, hi


@triton.jit
def _store(out, lo, hi, valid, GROUPS: tl.constexpr):
    """Round halves to the dtype of ``out`` and store the first ``valid`` elements."""
    index = _index(GROUPS)
    lo, hi = lo.to(out.dtype.element_ty), hi.to(out.dtype.element_ty)
    if valid == GROUPS * 2 * HALF:
        tl.store(out + index, lo)
        tl.store(out + index + HALF, hi)
    else:
        tl.store(out + index, lo, index < valid)
        tl.store(out + index + HALF, hi, index + HALF < valid)


@triton.jit
def _packed(x, minimum, inverse, taken):
    """Words ``[GROUPS * LANES]`` of the codes of a half; 0 is the code of what is not taken."""
    code = ((x - minimum[:, None]) * inverse[:, None] + MAGIC).to(tl.int32, bitcast=True) & 255
    return tl.sum(tl.where(taken, code, 0) << (8 * tl.arange(0, 4))[None, :], 1)


@triton.jit
def _quantized(lo, hi, valid, MASKED: tl.constexpr, GROUPS: tl.constexpr):
    """Code words ``[GROUPS * LANES, 2]`` and, at each lane, the parameters of its group; ``valid`` elements exist."""
    if MASKED:
        index = _index(GROUPS)
        lo_taken, hi_taken = index < valid, index + HALF < valid
        inf = float("inf")
        low = _least(tl.where(lo_taken, lo, inf), tl.where(hi_taken, hi, inf))
        high = tl.maximum(tl.where(lo_taken, lo, -inf), tl.where(hi_taken, hi, -inf))
    else:
        low, high = _least(lo, hi), tl.maximum(lo, hi)
    low, high = _of_groups(low, True, GROUPS), _of_groups(high, False, GROUPS)
    if MASKED:
        none = low > high
        low, high = tl.where(none, 0.0, low), tl.where(none, 0.0, high)
    bad, minimum, scale = _parameters(low, high, (high - low < float("inf")) == 0, 8)
    inverse = tl.div_rn(1.0, scale)
    lo_kept, hi_kept = (bad == 0)[:, None], (bad == 0)[:, None]
    if MASKED:
        lo_kept, hi_kept = lo_kept & lo_taken, hi_kept & hi_taken
    words = tl.join(_packed(lo, minimum, inverse, lo_kept), _packed(hi, minimum, inverse, hi_kept))
    parameter = (_as_bf16(scale, bad).to(tl.int32) & 65535) | (_as_bf16(minimum, bad).to(tl.int32) << 16)
    return words, parameter


@triton.jit
def _encode(lo, hi, valid, GROUPS: tl.constexpr):
    """``_quantized``, masked only where it has to be."""
    if valid == GROUPS * 2 * HALF:
        words, parameter = _quantized(lo, hi, valid, False, GROUPS)
    else:
        words, parameter = _quantized(lo, hi, valid, True, GROUPS)
    return words, parameter


@triton.jit
def _elements(words, parameter):
    """fp32 halves ``[GROUPS * LANES, 4]`` of code words and parameters."""
    shift = (8 * tl.arange(0, 4))[None, :]
    scale = (parameter << 16).to(tl.float32, bitcast=True)[:, None]
    minimum = (parameter & -65536).to(tl.float32, bitcast=True)[:, None]
    lo, hi = tl.split(words)
    lo = minimum + _code_value((lo[:, None] >> shift) & 255) * scale
    hi = minimum + _code_value((hi[:, None] >> shift) & 255) * scale
    return lo, hi


@triton.jit
def _region(
    own_ptr, offset, side, leg: tl.constexpr, source, block, programs, RANKS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Region ``block`` of a side and leg for words from rank ``source``, in the workspace ``offset`` bytes behind the own one."""
    words = (own_ptr + offset).to(tl.pointer_type(tl.int32), bitcast=True)
    return words + (((side * 2 + leg) * RANKS + source) * programs + block) * (GROUPS * (WORDS + 1))


@triton.jit
def _places(GROUPS: tl.constexpr):
    """Where the words ``[GROUPS * LANES, 2]`` lie in a region."""
    return tl.arange(0, GROUPS * LANES)[:, None] * 2 + tl.arange(0, 2)[None, :]


@triton.jit
def _put(
    words, parameter, here, own_ptr, peers_ptr, peer, side, leg: tl.constexpr, block, programs, RANK: tl.constexpr,
    RANKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Groups into the region that this rank has in the memory of rank ``peer``."""
    offset = tl.multiple_of(tl.load(peers_ptr + peer), 16)
    region = _region(own_ptr, offset, side, leg, RANK, block, programs, RANKS, GROUPS)
    lane = tl.arange(0, GROUPS * LANES)
    tl.store(region + _places(GROUPS), words, here[:, None])
    tl.store(region + GROUPS * WORDS + lane // LANES, parameter, here & (lane % LANES == 0))


@triton.jit
def _get(
    here, own_ptr, side, leg: tl.constexpr, source, block, programs, RANKS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """What has come from rank ``source`` as halves, and at each lane whether any of it is missing."""
    region = _region(own_ptr, 0, side, leg, source, block, programs, RANKS, GROUPS)
    words = tl.load(region + _places(GROUPS), here[:, None], 0, volatile=True)
    parameter = tl.load(region + GROUPS * WORDS + tl.arange(0, GROUPS * LANES) // LANES, here, 0, volatile=True)
    missing = tl.max((words == EMPTY).to(tl.int32), 1) | (parameter == EMPTY).to(tl.int32)
    lo, hi = _elements(words, parameter)
    return lo, hi, missing


@triton.jit
def _empty(
    own_ptr, side, leg: tl.constexpr, block, programs, RANK: tl.constexpr, RANKS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Empty words into the regions that the other ranks filled in the step before this one."""
    before = tl.where(side == 0, SIDES - 1, side - 1)
    for k in tl.static_range(1, RANKS):
        old = _region(own_ptr, 0, before, leg, (RANK + k) % RANKS, block, programs, RANKS, GROUPS)
        tl.store(old + tl.arange(0, GROUPS * WORDS), tl.full((GROUPS * WORDS,), EMPTY, tl.int32))
        tl.store(old + GROUPS * WORDS + tl.arange(0, GROUPS), tl.full((GROUPS,), EMPTY, tl.int32))


@triton.jit(do_not_specialize=["groups", "begin", "programs"])
def code_words_kernel(
    x_ptr, out_ptr, own_ptr, peers_ptr, counts_ptr, elements, length, groups, begin, programs,
    RANK: tl.constexpr, RANKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Sum ``x`` over the ranks into ``out``, both 1-D of ``elements``: of each slice of ``length`` elements, which are ``groups``
    groups, those from ``begin`` on that the programs of this launch take; the longest launch has ``programs``.
    """
    FULL: tl.constexpr = GROUPS * 2 * HALF
    block = tl.program_id(0)
    side = tl.load(counts_ptr + block)
    first = begin + block * GROUPS
    here = tl.arange(0, GROUPS * LANES) // LANES < groups - first
    place = tl.cast(first, tl.int64) * (2 * HALF)
    for k in tl.static_range(1, RANKS):
        peer = (RANK + k) % RANKS
        start, stop = _bounds(tl.cast(peer, tl.int32), elements, length, 0, groups, HALF)
        valid = _valid(start + place, stop, FULL)
        lo, hi = _load(x_ptr + start + place, valid, GROUPS)
        words, parameter = _encode(lo, hi, valid, GROUPS)
        _put(words, parameter, here, own_ptr, peers_ptr, peer, side, 0, block, programs, RANK, RANKS, GROUPS)
    start, stop = _bounds(tl.cast(RANK, tl.int32), elements, length, 0, groups, HALF)
    valid = _valid(start + place, stop, FULL)
    own_lo, own_hi = _load(x_ptr + start + place, valid, GROUPS)
    _empty(own_ptr, side, 0, block, programs, RANK, RANKS, GROUPS)
    _empty(own_ptr, side, 1, block, programs, RANK, RANKS, GROUPS)

    missing = 1
    while missing != 0:  # what is there is summed, stored and sent at once: no tensor leaves this loop
        absent = tl.zeros((GROUPS * LANES,), tl.int32)
        lo = tl.zeros((GROUPS * LANES, 4), tl.float32)
        hi = lo
        for source in tl.static_range(RANKS):
            if source == RANK:
                lo, hi = lo + own_lo, hi + own_hi
            else:
                more_lo, more_hi, gone = _get(here, own_ptr, side, 0, source, block, programs, RANKS, GROUPS)
                lo, hi, absent = lo + more_lo, hi + more_hi, absent | gone
        missing = tl.max(absent, 0)
        if missing == 0:
            words, parameter = _encode(lo, hi, valid, GROUPS)
            for k in tl.static_range(1, RANKS):
                peer = (RANK + k) % RANKS
                _put(words, parameter, here, own_ptr, peers_ptr, peer, side, 1, block, programs, RANK, RANKS, GROUPS)
            lo, hi = _elements(words, parameter)
            _store(out_ptr + start + place, lo, hi, valid, GROUPS)

    missing = 1
    while missing != 0:
        absent = tl.zeros((GROUPS * LANES,), tl.int32)
        for k in tl.static_range(1, RANKS):
            peer = (RANK + k) % RANKS
            start, stop = _bounds(tl.cast(peer, tl.int32), elements, length, 0, groups, HALF)
            lo, hi, gone = _get(here, own_ptr, side, 1, peer, block, programs, RANKS, GROUPS)
            absent |= gone
            _store(out_ptr + start + place, lo, hi, _valid(start + place, stop, FULL), GROUPS)
        missing = tl.max(absent, 0)
    tl.store(counts_ptr + block, tl.where(side == SIDES - 1, 0, side + 1))
