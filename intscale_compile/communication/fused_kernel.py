"""The two-step all-reduce of Flash Communication (arXiv 2412.04964) as ONE kernel over memory that all ranks of a host map.

Every rank has a workspace, mapped by all: flags, a slot for the message of each rank of the reduce leg, and one for each of
the gather leg. In each round a program takes a few neighbouring chunks of all slices. It writes their codes straight into the
memory of the rank that sums them, raises a flag there, sums what the others wrote for it, writes the codes of the sum into the
memory of every rank, and decodes what the owners wrote. Three rounds are under way at once, so a flag is looked at long after
it was raised; a flag waits for all writes before it, which is why large messages take several chunks a round.

Flags only grow: a program starts from the count that its last launch left in ``counts``, which needs no host and is why a
captured graph can be replayed. Program ``b`` waits for program ``b`` of the other ranks alone; programs are dispatched in
order, so the lowest one that is not done runs on every rank, and nothing can lock up.

Launches of any sizes may follow each other. A rank ends a launch when all others have summed, so the slots of the reduce leg are
free then; others may still decode, so the slots of the gather leg, which begin at the same place in every launch, are written
only after a flag of the new launch from every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .message import ALIGNMENT, MessageLayout
from .triton_kernels import ELEMENTS, _bounds, _constants, _load, _read, _store, _valid, _write

MOST_PROGRAMS = 1024  # flags of a rank and a leg
LARGE_CHUNK = 2 * ELEMENTS
# Two H200: 4 to 16 are alike from 32 MB on, 1 is half as fast (benchmarks/results/2026-11-22-h200x2-allreduce.md).
MOST_PER_ROUND = 4
PROGRAMS_PER_MULTIPROCESSOR = 4


def gather_slots(ranks: int, workspace_bytes: int) -> int:
    """Where the slots of the gather leg begin: behind the flags, half of a workspace is for each leg."""
    flags = 2 * ranks * MOST_PROGRAMS * 4
    return flags + (workspace_bytes - flags) // 2 // ALIGNMENT * ALIGNMENT


def workspace_bytes(ranks: int, layout: MessageLayout, out_layout: MessageLayout) -> int:
    """What a workspace needs for messages of these layouts."""
    return 2 * ranks * MOST_PROGRAMS * 4 + 2 * ranks * max(layout.nbytes, out_layout.nbytes)


@dataclass(frozen=True)
class Schedule:
    """How a launch divides slices; the same on all ranks.

    Attributes:
        chunk: elements of a slice that a program takes at a time.
        per_round: chunks that it takes between two flags.
        programs: of the launch.
    """

    chunk: int
    per_round: int
    programs: int

    def constants(self, layout: MessageLayout) -> dict:
        """Constants and launch options of the kernel for messages of this layout."""
        return {**_constants(layout), "GROUPS": self.chunk // layout.group_size}


def schedule(length: int, multiprocessors: int) -> Schedule:
    """For slices of ``length`` elements: small chunks while each has a multiprocessor for itself, as latency counts there."""
    chunk = ELEMENTS if length <= ELEMENTS * multiprocessors else LARGE_CHUNK
    chunks = -(-length // chunk)
    resident = min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, MOST_PROGRAMS)
    per_round = min(-(-chunks // resident), MOST_PER_ROUND)
    return Schedule(chunk, per_round, min(-(-chunks // per_round), resident))


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


@triton.jit
def _send(
    x_ptr, own_ptr, peers_ptr, chunk, slots, elements, length, groups, nbytes, BITS: tl.constexpr, HALF: tl.constexpr,
    SPIKES: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Reduce leg: a chunk of every other rank's slice, quantized into the memory of that rank."""
    FULL: tl.constexpr = GROUPS * 2 * HALF
    first = tl.cast(chunk, tl.int64) * GROUPS
    for peer in range(RANKS):
        if peer != RANK:
            start, stop = _bounds(tl.cast(peer, tl.int32), elements, length, 0, groups, HALF)
            start += first * (2 * HALF)
            valid = _valid(start, stop, FULL)
            message = _message(own_ptr, peers_ptr, peer, slots + tl.cast(nbytes, tl.int64) * RANK)
            lo, hi = _load(x_ptr + start, valid, HALF, GROUPS)
            if valid == FULL:
                _write(lo, hi, valid, message, first, groups, BITS, HALF, SPIKES, False, GROUPS)
            else:
                _write(lo, hi, valid, message, first, groups, BITS, HALF, SPIKES, True, GROUPS)


@triton.jit
def _sum(
    x_ptr, own_ptr, peers_ptr, chunk, slots, out_slots, elements, length, groups, nbytes, out_nbytes,
    BITS: tl.constexpr, OUT_BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr, GROUPS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A chunk of the own slice, summed over the ranks in their order, quantized into the memory of every rank."""
    FULL: tl.constexpr = GROUPS * 2 * HALF
    first = tl.cast(chunk, tl.int64) * GROUPS
    start, stop = _bounds(tl.cast(RANK, tl.int32), elements, length, 0, groups, HALF)
    start += first * (2 * HALF)
    valid = _valid(start, stop, FULL)
    lo = tl.zeros((GROUPS, HALF), tl.float32)
    hi = lo
    for peer in range(RANKS):
        if peer == RANK:
            more_lo, more_hi = _load(x_ptr + start, valid, HALF, GROUPS)
        else:
            message = _message(own_ptr, peers_ptr, RANK, slots + tl.cast(nbytes, tl.int64) * peer)
            more_lo, more_hi = _read(message, first, groups, BITS, HALF, SPIKES, GROUPS)
        lo, hi = lo + more_lo, hi + more_hi
    slot = out_slots + tl.cast(out_nbytes, tl.int64) * RANK
    if valid == FULL:  # the compiler takes what is alike for all peers out of these loops
        for peer in range(RANKS):
            message = _message(own_ptr, peers_ptr, peer, slot)
            _write(lo, hi, valid, message, first, groups, OUT_BITS, HALF, SPIKES, False, GROUPS)
    else:
        for peer in range(RANKS):
            message = _message(own_ptr, peers_ptr, peer, slot)
            _write(lo, hi, valid, message, first, groups, OUT_BITS, HALF, SPIKES, True, GROUPS)


@triton.jit
def _receive(
    out_ptr, own_ptr, peers_ptr, chunk, out_slots, elements, length, groups, out_nbytes, OUT_BITS: tl.constexpr,
    HALF: tl.constexpr, SPIKES: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Gather leg: a chunk of every slice, decoded into ``out``."""
    FULL: tl.constexpr = GROUPS * 2 * HALF
    first = tl.cast(chunk, tl.int64) * GROUPS
    for owner in range(RANKS):
        start, stop = _bounds(tl.cast(owner, tl.int32), elements, length, 0, groups, HALF)
        start += first * (2 * HALF)
        message = _message(own_ptr, peers_ptr, RANK, out_slots + tl.cast(out_nbytes, tl.int64) * owner)
        lo, hi = _read(message, first, groups, OUT_BITS, HALF, SPIKES, GROUPS)
        _store(out_ptr + start, lo, hi, _valid(start, stop, FULL), HALF, GROUPS)


# The number of groups and of chunks a round vary from call to call: one compilation for all of them.
@triton.jit(do_not_specialize=["groups", "per_round"])
def fused_all_reduce_kernel(
    x_ptr, out_ptr, own_ptr, peers_ptr, counts_ptr, elements, length, groups, per_round, nbytes, out_nbytes, out_slots,
    BITS: tl.constexpr, OUT_BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr, GROUPS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sum ``x`` over the ranks into ``out``, both 1-D of ``elements``; slices have ``length`` elements, ``groups`` groups.

    ``per_round``: how many chunks of ``GROUPS`` groups a program takes between two flags. ``out_slots``: where in a workspace the
    slots of the gather leg begin.
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    chunks = tl.cdiv(groups, GROUPS)
    rounds = tl.cdiv(chunks, blocks * per_round)
    done = tl.load(counts_ptr + block)
    groups = tl.cast(groups, tl.int64)
    slots = 2 * RANKS * PROGRAMS * 4

    for i in range(rounds + 2):
        begin = (block + i * blocks) * per_round
        if i < rounds:
            for chunk in range(begin, tl.minimum(begin + per_round, chunks)):
                _send(
                    x_ptr, own_ptr, peers_ptr, chunk, slots, elements, length, groups, nbytes,
                    BITS, HALF, SPIKES, GROUPS, RANK, RANKS,
                )  # fmt: skip
            _raise_flags(own_ptr, peers_ptr, 0, block, done + i + 1, RANK, RANKS, PROGRAMS)

        if (i > 0) & (i <= rounds):
            _await_flags(own_ptr, peers_ptr, 0, block, done + i, RANK, RANKS, PROGRAMS)
            before = begin - blocks * per_round
            for chunk in range(before, tl.minimum(before + per_round, chunks)):
                _sum(
                    x_ptr, own_ptr, peers_ptr, chunk, slots, out_slots, elements, length, groups, nbytes, out_nbytes,
                    BITS, OUT_BITS, HALF, SPIKES, GROUPS, RANK, RANKS,
                )  # fmt: skip
            _raise_flags(own_ptr, peers_ptr, 1, block, done + i, RANK, RANKS, PROGRAMS)

        if i > 1:
            _await_flags(own_ptr, peers_ptr, 1, block, done + i - 1, RANK, RANKS, PROGRAMS)
            before = begin - 2 * blocks * per_round
            for chunk in range(before, tl.minimum(before + per_round, chunks)):
                _receive(
                    out_ptr, own_ptr, peers_ptr, chunk, out_slots, elements, length, groups, out_nbytes,
                    OUT_BITS, HALF, SPIKES, GROUPS, RANK, RANKS,
                )  # fmt: skip
    tl.store(counts_ptr + block, done + rounds)
