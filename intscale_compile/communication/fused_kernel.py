"""The two-step all-reduce of Flash Communication (arXiv 2412.04964) as ONE kernel over memory that all ranks of a host map.

Every rank has a workspace, mapped by all: flags, a slot for the message of each rank of the reduce leg, and one for each of
the gather leg. A program takes every n-th chunk of all slices. It writes the codes of a chunk straight into the memory of the
rank that sums it, raises a flag there, sums what the others wrote for it, writes the codes of the sum into the memory of every
rank, and decodes what the owners wrote. Three chunks are under way at once, so a flag is looked at long after it was raised.

Flags only grow: a program starts from the count that its last launch left in ``counts``, which needs no host and is why a
captured graph can be replayed. Program ``b`` waits for program ``b`` of the other ranks alone; programs are dispatched in
order, so the lowest one that is not done runs on every rank, and nothing can lock up. A slot is written again only by the next
launch, after a flag that its reader raised in a launch after the one that read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _bounds, _load, _read, _store, _valid, _write

MOST_PROGRAMS = 1024  # flags of a rank and a leg


@triton.jit
def _message(own_ptr, peers_ptr, rank, offset):
    """Where a message lies in the workspace of a rank, reached from this rank's own: so its alignment is known."""
    return own_ptr + (tl.multiple_of(tl.load(peers_ptr + rank), 16) + offset)


@triton.jit
def _flags(own_ptr, peers_ptr, rank):
    """The flags in the workspace of a rank."""
    return (own_ptr + tl.load(peers_ptr + rank)).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _raise_flags(
    own_ptr, peers_ptr, leg, block, value, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Publish what all threads of this program have written so far, to every other rank."""
    tl.debug_barrier()
    for peer in range(RANKS):
        if peer != RANK:
            flag = _flags(own_ptr, peers_ptr, peer) + (leg * RANKS + RANK) * PROGRAMS + block
            tl.atomic_xchg(flag, value, sem="release", scope="sys")


@triton.jit
def _await_flags(
    own_ptr, peers_ptr, leg, block, value, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Wait until the flag that each other rank raises in this rank's memory has reached ``value``; flags may wrap around."""
    for peer in range(RANKS):
        if peer != RANK:
            flag = _flags(own_ptr, peers_ptr, RANK) + (leg * RANKS + peer) * PROGRAMS + block
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            while seen - value < 0:
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")


# The number of groups varies from call to call: one compilation for all of them.
@triton.jit(do_not_specialize=["groups"])
def fused_all_reduce_kernel(
    x_ptr, out_ptr, own_ptr, peers_ptr, counts_ptr, elements, length, groups, nbytes, out_nbytes, BITS: tl.constexpr,
    OUT_BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sum ``x`` over the ranks into ``out``, both 1-D of ``elements``; slices have ``length`` elements, ``groups`` groups."""
    FULL: tl.constexpr = GROUPS * 2 * HALF
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    chunks = tl.cdiv(groups, GROUPS)
    rounds = tl.cdiv(chunks, blocks)
    done = tl.load(counts_ptr + block)
    groups = tl.cast(groups, tl.int64)
    reduce_slots = 2 * RANKS * PROGRAMS * 4
    gather_slots = reduce_slots + tl.cast(nbytes, tl.int64) * RANKS

    for i in range(rounds + 2):
        chunk = block + i * blocks
        if i < rounds:
            if chunk < chunks:
                first = chunk.to(tl.int64) * GROUPS
                for peer in range(RANKS):
                    if peer != RANK:
                        start, stop = _bounds(tl.cast(peer, tl.int32), elements, length, 0, groups, HALF)
                        start += first * (2 * HALF)
                        valid = _valid(start, stop, FULL)
                        message = _message(own_ptr, peers_ptr, peer, reduce_slots + tl.cast(nbytes, tl.int64) * RANK)
                        lo, hi = _load(x_ptr + start, valid, HALF, GROUPS)
                        if valid == FULL:
                            _write(lo, hi, valid, message, first, groups, BITS, HALF, SPIKES, False, GROUPS)
                        else:
                            _write(lo, hi, valid, message, first, groups, BITS, HALF, SPIKES, True, GROUPS)
            _raise_flags(own_ptr, peers_ptr, 0, block, done + i + 1, RANK, RANKS, PROGRAMS)

        if (i > 0) & (i <= rounds):
            _await_flags(own_ptr, peers_ptr, 0, block, done + i, RANK, RANKS, PROGRAMS)
            if chunk - blocks < chunks:
                first = (chunk - blocks).to(tl.int64) * GROUPS
                start, stop = _bounds(tl.cast(RANK, tl.int32), elements, length, 0, groups, HALF)
                start += first * (2 * HALF)
                valid = _valid(start, stop, FULL)
                lo = tl.zeros((GROUPS, HALF), tl.float32)
                hi = lo
                for peer in range(RANKS):
                    if peer == RANK:
                        more_lo, more_hi = _load(x_ptr + start, valid, HALF, GROUPS)
                    else:
                        message = _message(own_ptr, peers_ptr, RANK, reduce_slots + tl.cast(nbytes, tl.int64) * peer)
                        more_lo, more_hi = _read(message, first, groups, BITS, HALF, SPIKES, GROUPS)
                    lo, hi = lo + more_lo, hi + more_hi
                slot = gather_slots + tl.cast(out_nbytes, tl.int64) * RANK
                if valid == FULL:  # the compiler takes what is alike for all peers out of these loops
                    for peer in range(RANKS):
                        message = _message(own_ptr, peers_ptr, peer, slot)
                        _write(lo, hi, valid, message, first, groups, OUT_BITS, HALF, SPIKES, False, GROUPS)
                else:
                    for peer in range(RANKS):
                        message = _message(own_ptr, peers_ptr, peer, slot)
                        _write(lo, hi, valid, message, first, groups, OUT_BITS, HALF, SPIKES, True, GROUPS)
            _raise_flags(own_ptr, peers_ptr, 1, block, done + i, RANK, RANKS, PROGRAMS)

        if i > 1:
            _await_flags(own_ptr, peers_ptr, 1, block, done + i - 1, RANK, RANKS, PROGRAMS)
            if chunk - 2 * blocks < chunks:
                first = (chunk - 2 * blocks).to(tl.int64) * GROUPS
                for owner in range(RANKS):
                    start, stop = _bounds(tl.cast(owner, tl.int32), elements, length, 0, groups, HALF)
                    start += first * (2 * HALF)
                    message = _message(own_ptr, peers_ptr, RANK, gather_slots + tl.cast(out_nbytes, tl.int64) * owner)
                    lo, hi = _read(message, first, groups, OUT_BITS, HALF, SPIKES, GROUPS)
                    _store(out_ptr + start, lo, hi, _valid(start, stop, FULL), HALF, GROUPS)
    tl.store(counts_ptr + block, done + rounds)
