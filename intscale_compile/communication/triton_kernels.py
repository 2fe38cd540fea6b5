"""Triton kernels of the quantized collectives, the bits of ``reference.py`` in one pass over the data each.

``encode``: elements to messages, of all peers in one launch. ``reduce``: messages of all peers and the own elements, summed in
fp32 in rank order, and the sum to a message again or to elements. ``decode``: messages to elements.

A program takes ``GROUPS`` groups in two halves: the halves of a group meet in the bytes of 4-bit codes, so codes are packed
without an exchange between threads, and a thread of the first half loads 16 bytes of bf16. Codes are made and read by adding
2**23, which leaves an integer in the low bits of an fp32, not by conversions, of which a GPU does few at a time.
"""

from __future__ import annotations

import contextlib
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .message import MessageLayout
from .pieces import Piece
from .reference import SMALLEST_SCALE

SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_SCALE)
MAGIC: tl.constexpr = tl.constexpr(8388608.0)  # 2**23: fp32 from here on has no fraction
WARPS = 4
ELEMENTS = 16 * 32 * WARPS  # of one program: eight of each half for a thread, so that all its layouts agree


@triton.jit
def _ends(lo, hi, lo_taken, hi_taken, ALL: tl.constexpr):
    """Smallest and largest of each group among the elements taken, of two halves ``[GROUPS, g/2]``; 0 if there is none."""
    if ALL:
        low, high = tl.min(tl.minimum(lo, hi), 1), tl.max(tl.maximum(lo, hi), 1)
    else:
        inf = float("inf")
        low = tl.min(tl.minimum(tl.where(lo_taken, lo, inf), tl.where(hi_taken, hi, inf)), 1)
        high = tl.max(tl.maximum(tl.where(lo_taken, lo, -inf), tl.where(hi_taken, hi, -inf)), 1)
        none = low > high
        low, high = tl.where(none, 0.0, low), tl.where(none, 0.0, high)
    return low, high


@triton.jit
def _first(lo, hi, lo_taken, hi_taken, value, place, HALF: tl.constexpr):
    """First place of ``value`` in each group; 0 where there is none."""
    lo_place = tl.where(lo_taken & (lo == value[:, None]), place, 2 * HALF)
    hi_place = tl.where(hi_taken & (hi == value[:, None]), place + HALF, 2 * HALF)
    first = tl.min(tl.minimum(lo_place, hi_place), 1)
    return tl.where(first == 2 * HALF, 0, first)


@triton.jit
def _nearest(x):
    """fp32 rounded to bf16, ties to even, as fp32; 0.0 for -0.0 and infinite beyond the largest bf16."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == 0, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _half_plane(codes, BITS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr):
    """The four bits that codes ``[GROUPS, g/2]`` of one half have in each byte of the plane of high bits, int32."""
    if BITS == 5:
        high = tl.reshape(codes >> 4, (GROUPS, 4, HALF // 4))
        return tl.sum(high << tl.arange(0, 4)[None, :, None], 1)
    else:
        even, odd = tl.split(tl.reshape(codes >> 4, (GROUPS, HALF // 2, 2)))
        return even | (odd << 2)


@triton.jit
def _from_half_plane(plane, BITS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr):
    """The inverse: high bits ``[GROUPS, g/2]``, in their place in the codes, from the low four bits of each byte."""
    if BITS == 5:
        high = (plane[:, None, :] >> tl.arange(0, 4)[None, :, None]) & 1
    else:
        high = tl.join(plane & 3, (plane >> 2) & 3)
    return tl.reshape(high << 4, (GROUPS, HALF))


@triton.jit
def _write(
    lo, hi, valid, message, first, groups, BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr,
    MASKED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Quantize fp32 halves ``[GROUPS, g/2]`` and write them into ``message`` as its groups ``first, first + 1, ...``.

    ``valid``: how many elements of these groups exist; looked at where ``MASKED``, which an incomplete block needs.
    """
    g = tl.arange(0, GROUPS)
    place = tl.arange(0, HALF)[None, :]
    index = g[:, None] * (2 * HALF) + place
    lo_taken, hi_taken = index < valid, index + HALF < valid
    if MASKED:
        lo, hi = tl.where(lo_taken, lo, 0.0), tl.where(hi_taken, hi, 0.0)
    low, high = _ends(lo, hi, lo_taken, hi_taken, not MASKED)
    # Minimum and maximum of a GPU pass over NaN; a sum of products with 0 does not, nor over an infinity.
    bad = (tl.sum(lo * 0.0 + hi * 0.0, 1) != 0.0) | ((high - low < float("inf")) == 0)
    smallest, largest, low_place, high_place = low, high, g, g
    if SPIKES:
        low_place = _first(lo, hi, lo_taken, hi_taken, low, place, HALF)
        high_place = _first(lo, hi, lo_taken, hi_taken, high, place, HALF)
        lo_taken = lo_taken & (place != low_place[:, None]) & (place != high_place[:, None])
        hi_taken = hi_taken & (place + HALF != low_place[:, None]) & (place + HALF != high_place[:, None])
        low, high = _ends(lo, hi, lo_taken, hi_taken, False)
    bad, minimum, scale = _parameters(low, high, bad, BITS)
    # No clamp: minimum <= x, and scale * the largest code >= high - minimum. A row of NaN has no code but 0.
    inverse = tl.div_rn(1.0, scale)[:, None]
    lo_code = ((lo - minimum[:, None]) * inverse + MAGIC).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
    hi_code = ((hi - minimum[:, None]) * inverse + MAGIC).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
    lo_kept, hi_kept = (bad == 0)[:, None], (bad == 0)[:, None]
    if MASKED or SPIKES:
        lo_kept, hi_kept = lo_kept & lo_taken, hi_kept & hi_taken
    lo_code, hi_code = tl.where(lo_kept, lo_code, 0), tl.where(hi_kept, hi_code, 0)
    _write_codes(lo_code, hi_code, message, first, groups, BITS, HALF, GROUPS)

    here = g < groups - first
    parameters = (message + groups * (2 * HALF * BITS // 8)).to(tl.pointer_type(tl.int16), bitcast=True) + first
    tl.store(parameters + g, _as_bf16(scale, bad), mask=here)
    tl.store(parameters + groups + g, _as_bf16(minimum, bad), mask=here)
    if SPIKES:
        values = parameters + 2 * groups + first + 2 * g
        tl.store(values, _as_bf16(_nearest(smallest), bad), mask=here)
        tl.store(values + 1, _as_bf16(_nearest(largest), bad), mask=here)
        places = message + groups * (2 * HALF * BITS // 8 + 8) + 2 * first + 2 * g
        tl.store(places, tl.where(bad, 0, low_place).to(tl.uint8), mask=here)
        tl.store(places + 1, tl.where(bad, 0, high_place).to(tl.uint8), mask=here)


@triton.jit
def _parameters(low, high, bad, BITS: tl.constexpr):
    """Whether a group has no finite range; its minimum, rounded down to bf16, and its scale, rounded up."""
    bits = low.to(tl.int32, bitcast=True)
    down = (bits & -65536) + tl.where((bits < 0) & ((bits & 65535) != 0), 65536, 0)
    minimum = tl.where(low == 0, 0.0, down.to(tl.float32, bitcast=True))
    extent = high - minimum
    bad = bad | ((extent < float("inf")) == 0)
    scale = tl.div_rn(tl.where(bad, 0.0, extent), 254.0 if BITS == 8 else (1 << BITS) - 1.0)
    scale = ((scale.to(tl.int32, bitcast=True) + 65535) & -65536).to(tl.float32, bitcast=True)
    return bad, minimum, tl.maximum(scale, SMALLEST)


@triton.jit
def _as_bf16(x, bad):
    """fp32 that are numbers of bf16, or NaN where ``bad``, as int16."""
    return tl.where(bad, 0x7FC0, x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _from_bf16(bits):
    """The number of bf16 that an int16 holds, as fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _write_codes(
    lo, hi, message, first, groups, BITS: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Pack int32 codes ``[GROUPS, g/2]``, two halves, into the planes of the message."""
    g = tl.arange(0, GROUPS)[:, None]
    place = tl.arange(0, HALF)[None, :]
    here = g < groups - first
    if BITS == 8:
        codes = message + first * (2 * HALF) + (g * (2 * HALF) + place)
        tl.store(codes, lo.to(tl.uint8), mask=here)
        tl.store(codes + HALF, hi.to(tl.uint8), mask=here)
    else:
        packed = (lo & 15) | ((hi & 15) << 4)
        tl.store(message + first * HALF + (g * HALF + place), packed.to(tl.uint8), mask=here)
    if BITS == 5 or BITS == 6:
        BYTES: tl.constexpr = HALF * (BITS - 4) // 4
        plane = _half_plane(lo, BITS, GROUPS, HALF) | (_half_plane(hi, BITS, GROUPS, HALF) << 4)
        byte = g * BYTES + tl.arange(0, BYTES)[None, :]
        tl.store(message + (groups * HALF + first * BYTES) + byte, plane.to(tl.uint8), mask=here)


@triton.jit
def _read(
    message, first, groups, BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr, GROUPS: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """fp32 halves ``[GROUPS, g/2]`` of the groups ``first, first + 1, ...`` of a message; of no meaning behind its last.

    ``CACHE``: modifier of the loads; other GPUs may have written the message while this kernel ran.
    """
    g = tl.arange(0, GROUPS)
    place = tl.arange(0, HALF)[None, :]
    here = g < groups - first
    mask = here[:, None]
    if BITS == 8:
        codes = message + first * (2 * HALF) + (g[:, None] * (2 * HALF) + place)
        lo, hi = (
            tl.load(codes, mask, 0, cache_modifier=CACHE).to(tl.int32),
            tl.load(codes + HALF, mask, 0, cache_modifier=CACHE).to(tl.int32),
        )
    else:
        packed = tl.load(message + first * HALF + (g[:, None] * HALF + place), mask, 0, cache_modifier=CACHE).to(
            tl.int32
        )
        lo, hi = packed & 15, packed >> 4
    if BITS == 5 or BITS == 6:
        BYTES: tl.constexpr = HALF * (BITS - 4) // 4
        byte = g[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        plane = tl.load(message + (groups * HALF + first * BYTES) + byte, mask, 0, cache_modifier=CACHE).to(tl.int32)
        lo = lo | _from_half_plane(plane, BITS, GROUPS, HALF)
        hi = hi | _from_half_plane(plane >> 4, BITS, GROUPS, HALF)
    parameters = (message + groups * (2 * HALF * BITS // 8)).to(tl.pointer_type(tl.int16), bitcast=True) + first
    scale = _from_bf16(tl.load(parameters + g, here, 0, cache_modifier=CACHE))[:, None]
    minimum = _from_bf16(tl.load(parameters + groups + g, here, 0, cache_modifier=CACHE))[:, None]
    lo = minimum + _code_value(lo) * scale
    hi = minimum + _code_value(hi) * scale
    if SPIKES:
        values = parameters + 2 * groups + first + 2 * g
        places = message + groups * (2 * HALF * BITS // 8 + 8) + 2 * first + 2 * g
        for end in tl.static_range(2):
            value = _from_bf16(tl.load(values + end, here, 0, cache_modifier=CACHE))[:, None]
            spike = tl.load(places + end, here, 0, cache_modifier=CACHE).to(tl.int32)[:, None]
            lo, hi = tl.where(place == spike, value, lo), tl.where(place + HALF == spike, value, hi)
    return lo, hi


@triton.jit
def _code_value(code):
    """A code as fp32: a logical or and a subtraction, which are exact."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def _padding(message, groups, nbytes, BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr):
    """Zeros behind the last part of a message."""
    end = groups * (2 * HALF * BITS // 8 + (10 if SPIKES else 4)) + tl.arange(0, 16)
    tl.store(message + end, tl.zeros((16,), tl.uint8), mask=end < nbytes)


@triton.jit
def _bounds(owner, elements, length, begin, groups, HALF: tl.constexpr):
    """``Piece.bounds``; the second is not above the first where there is no element."""
    start = owner.to(tl.int64) * length + begin
    stop = tl.minimum(start + tl.cast(groups, tl.int64) * (2 * HALF), (owner + 1).to(tl.int64) * length)
    return start, tl.minimum(stop, elements)


@triton.jit
def _valid(start, stop, BLOCK: tl.constexpr):
    """How many of the ``BLOCK`` elements from ``start`` on lie before ``stop``."""
    return tl.maximum(tl.minimum(stop - start, BLOCK), 0).to(tl.int32)


@triton.jit
def _load(x, valid, HALF: tl.constexpr, GROUPS: tl.constexpr):
    """fp32 halves ``[GROUPS, g/2]`` of the elements at ``x``; zeros from ``valid`` on."""
    index = tl.arange(0, GROUPS)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    if valid == GROUPS * 2 * HALF:  # without a mask loads are wide
        lo, hi = tl.load(x + index).to(tl.float32), tl.load(x + index + HALF).to(tl.float32)
    else:
        lo = tl.load(x + index, index < valid, 0.0).to(tl.float32)
        hi = tl.load(x + index + HALF, index + HALF < valid, 0.0).to(tl.float32)
    return lo, hi


@triton.jit
def _store(out, lo, hi, valid, HALF: tl.constexpr, GROUPS: tl.constexpr):
    """Round fp32 halves ``[GROUPS, g/2]`` to the dtype of ``out`` and store the first ``valid`` elements."""
    index = tl.arange(0, GROUPS)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    lo, hi = lo.to(out.dtype.element_ty), hi.to(out.dtype.element_ty)
    if valid == GROUPS * 2 * HALF:
        tl.store(out + index, lo)
        tl.store(out + index + HALF, hi)
    else:
        tl.store(out + index, lo, index < valid)
        tl.store(out + index + HALF, hi, index + HALF < valid)


@triton.jit
def _encode(
    lo, hi, valid, message, first, groups, nbytes, BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    if valid == GROUPS * 2 * HALF:
        _write(lo, hi, valid, message, first, groups, BITS, HALF, SPIKES, False, GROUPS)
    else:
        _write(lo, hi, valid, message, first, groups, BITS, HALF, SPIKES, True, GROUPS)
    if first == 0:
        _padding(message, groups, nbytes, BITS, HALF, SPIKES)


@triton.jit(do_not_specialize=["groups", "skip"])
def encode_kernel(
    x_ptr, message_ptr, elements, length, begin, groups, nbytes, skip, BITS: tl.constexpr, HALF: tl.constexpr,
    SPIKES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(1)`` of the messages: that owner's part of ``x``, owners counted without ``skip``."""
    row = tl.program_id(1)
    start, stop = _bounds(row + (row >= skip).to(tl.int32), elements, length, begin, groups, HALF)
    first = tl.program_id(0).to(tl.int64) * GROUPS
    start += first * (2 * HALF)
    valid = _valid(start, stop, GROUPS * 2 * HALF)
    lo, hi = _load(x_ptr + start, valid, HALF, GROUPS)
    message = message_ptr + row.to(tl.int64) * nbytes
    _encode(lo, hi, valid, message, first, tl.cast(groups, tl.int64), nbytes, BITS, HALF, SPIKES, GROUPS)


@triton.jit(do_not_specialize=["groups"])
def reduce_kernel(
    x_ptr, received_ptr, out_ptr, elements, length, begin, groups, nbytes, out_nbytes, RANK: tl.constexpr,
    RANKS: tl.constexpr, BITS: tl.constexpr, OUT_BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Sum own elements and messages in rank order; to a message, or with ``OUT_BITS`` 0 to elements of the slice."""
    rank = tl.program_id(1) + RANK
    start, stop = _bounds(rank, elements, length, begin, groups, HALF)
    first = tl.program_id(0).to(tl.int64) * GROUPS
    start += first * (2 * HALF)
    groups = tl.cast(groups, tl.int64)
    valid = _valid(start, stop, GROUPS * 2 * HALF)
    lo = tl.zeros((GROUPS, HALF), tl.float32)
    hi = lo
    for other in tl.static_range(RANKS):
        if other == RANK:
            more_lo, more_hi = _load(x_ptr + start, valid, HALF, GROUPS)
        else:
            message = received_ptr + tl.cast(nbytes, tl.int64) * (other - (other > RANK))
            more_lo, more_hi = _read(message, first, groups, BITS, HALF, SPIKES, GROUPS, "")
        lo, hi = lo + more_lo, hi + more_hi
    if OUT_BITS == 0:
        _store(out_ptr + (start - rank.to(tl.int64) * length), lo, hi, valid, HALF, GROUPS)
    else:
        _encode(lo, hi, valid, out_ptr, first, groups, out_nbytes, OUT_BITS, HALF, SPIKES, GROUPS)


@triton.jit(do_not_specialize=["groups"])
def decode_kernel(
    received_ptr, out_ptr, elements, length, begin, groups, nbytes, BITS: tl.constexpr, HALF: tl.constexpr,
    SPIKES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The message in row ``program_id(1)`` to that owner's part of ``out``."""
    row = tl.program_id(1)
    start, stop = _bounds(row, elements, length, begin, groups, HALF)
    first = tl.program_id(0).to(tl.int64) * GROUPS
    start += first * (2 * HALF)
    message = received_ptr + row.to(tl.int64) * nbytes
    lo, hi = _read(message, first, tl.cast(groups, tl.int64), BITS, HALF, SPIKES, GROUPS, "")
    _store(out_ptr + start, lo, hi, _valid(start, stop, GROUPS * 2 * HALF), HALF, GROUPS)


def _grid(piece: Piece, rows: int) -> tuple[int, int]:
    return triton.cdiv(piece.groups * piece.group_size, ELEMENTS), rows


def _constants(layout: MessageLayout) -> dict:
    """Constants and launch options of every kernel. Products and sums stay apart, as in the reference: same bits."""
    half = layout.group_size // 2
    return dict(
        BITS=layout.bits, HALF=half, SPIKES=layout.spikes, GROUPS=ELEMENTS // layout.group_size,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def encode(x: Tensor, piece: Piece, layout: MessageLayout, messages: Tensor, skip: int) -> None:
    """Messages uint8 ``[rows, nbytes]`` of the parts of ``x`` that the owners 0, 1, ... but ``skip`` have of a piece."""
    with _on(x):
        encode_kernel[_grid(piece, messages.shape[0])](
            x, messages, piece.elements, piece.length, piece.begin, piece.groups, layout.nbytes, skip,
            **_constants(layout),
        )  # fmt: skip


def reduce(
    x: Tensor,
    received: Tensor,
    piece: Piece,
    rank: int,
    layout: MessageLayout,
    out: Tensor,
    out_layout: Optional[MessageLayout],
) -> None:
    """Sum the own part of ``x`` and ``received``, uint8 ``[ranks - 1, nbytes]``.

    Into ``out``: a message uint8 ``[nbytes]`` of ``out_layout``, or, where that is None, elements of the whole slice.
    """
    with _on(x):
        reduce_kernel[_grid(piece, 1)](
            x, received, out, piece.elements, piece.length, piece.begin, piece.groups, layout.nbytes,
            out_layout.nbytes if out_layout else 0, RANK=rank, RANKS=received.shape[0] + 1,
            OUT_BITS=out_layout.bits if out_layout else 0, **_constants(layout),
        )  # fmt: skip


def decode(received: Tensor, piece: Piece, layout: MessageLayout, out: Tensor) -> None:
    """Messages uint8 ``[ranks, nbytes]`` to the elements of a piece in the 1-D ``out``."""
    with _on(out):
        decode_kernel[_grid(piece, received.shape[0])](
            received, out, piece.elements, piece.length, piece.begin, piece.groups, layout.nbytes, **_constants(layout)
        )
