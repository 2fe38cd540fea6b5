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
from .triton_kernels import ELEMENTS, WARPS, _bounds, _constants, _load, _read, _store, _valid, _write

MOST_PROGRAMS = 1024  # flags of a rank and a leg
LARGE_CHUNK = 2 * ELEMENTS
# Two H200: 4 to 16 are alike from 32 MB on, 1 is half as fast (benchmarks/results/2026-11-22-h200x2-allreduce.md).
MOST_PER_ROUND = 4
# Four H100, by bits of an element: up to 9 % from 32 MB on (benchmarks/results/2026-11-27-h100x4.md); 8 bits one in long slices.
MOST_PER_ROUND_OF_FOUR = {16: 1, 8: 2}
LONG_SLICE = 4 << 20  # elements
PROGRAMS_PER_MULTIPROCESSOR = 4
SIDE_BY_SIDE: tl.constexpr = tl.constexpr(ELEMENTS)
MOST_RANKS = 16
LANES: tl.constexpr = tl.constexpr(MOST_RANKS)  # a flag each


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
        limit = (
            {"maxnreg": min(255, 65536 // (32 * WARPS * PROGRAMS_PER_MULTIPROCESSOR) // 8 * 8)}
            if self.chunk > ELEMENTS
            else {}
        )
        return {**_constants(layout), "GROUPS": self.chunk // layout.group_size, **limit}


def schedule(length: int, multiprocessors: int, ranks: int, bits: int) -> Schedule:
    """For slices of ``length`` elements: small chunks while each has a multiprocessor for itself, as latency counts there."""
    most = MOST_PER_ROUND_OF_FOUR.get(bits, MOST_PER_ROUND) if ranks >= 4 else MOST_PER_ROUND
    if ranks >= 4 and bits == 8 and length > LONG_SLICE:
        most = 1
    chunk = ELEMENTS if length <= ELEMENTS * multiprocessors else LARGE_CHUNK
    chunks = -(-length // chunk)
    resident = min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, MOST_PROGRAMS)
    per_round = min(-(-chunks // resident), most)
    return Schedule(chunk, per_round, min(-(-chunks // per_round), resident))


@triton.jit
def _message(own_ptr, peers_ptr, rank, offset):
    """Where a message lies in the workspace of a rank, reached from this rank's own: so its alignment is known."""
    return own_ptr + (tl.multiple_of(tl.load(peers_ptr + rank), 16) + offset)


@triton.jit
def _flags(own_ptr, offsets, leg, source, block, RANKS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Where the flags of ranks ``source`` lie in the workspaces that begin ``offsets`` bytes behind the own one."""
    return (own_ptr + offsets).to(tl.pointer_type(tl.int32), bitcast=True) + (leg * RANKS + source) * PROGRAMS + block


@triton.jit
def _raise_flags(
    own_ptr, peers_ptr, leg, block, value, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Publish what all threads of this program have written so far, to all other ranks at once: one fence, no answer awaited."""
    peer = tl.arange(0, LANES)
    others = (peer < RANKS) & (peer != RANK)
    flags = _flags(own_ptr, tl.load(peers_ptr + peer, others, 0), leg, RANK, block, RANKS, PROGRAMS)
    tl.debug_barrier()
    tl.atomic_xchg(flags, value, others, sem="release", scope="sys")


@triton.jit
def _await_flags(own_ptr, leg, block, value, RANK: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Wait until the flags that all other ranks raise in this rank's memory have reached ``value``; flags may wrap around.

    What the flags publish is read around the cache of the multiprocessor, which may hold what was there before.
    """
    peer = tl.arange(0, LANES)
    others = (peer < RANKS) & (peer != RANK)
    flags = _flags(own_ptr, tl.zeros((LANES,), tl.int64), leg, peer, block, RANKS, PROGRAMS)
    least = tl.min(tl.where(others, tl.load(flags, others, 0, volatile=True) - value, 0), 0)
    while least < 0:
        least = tl.min(tl.where(others, tl.load(flags, others, 0, volatile=True) - value, 0), 0)
    tl.debug_barrier()  # no load of what they publish moves before this


@triton.jit
def _put(
    lo, hi, valid, message, first, groups, dtype: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr,
    SPIKES: tl.constexpr, MASKED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A chunk into a message: quantized, or with 16 ``BITS`` the elements themselves."""
    if BITS == 16:
        g = tl.arange(0, GROUPS)[:, None]
        elements = message.to(tl.pointer_type(dtype), bitcast=True) + first * (2 * HALF)
        index = g * (2 * HALF) + tl.arange(0, HALF)[None, :]
        tl.store(elements + index, lo.to(dtype), g < groups - first)
        tl.store(elements + index + HALF, hi.to(dtype), g < groups - first)
    else:
        _write(lo, hi, valid, message, first, groups, BITS, HALF, SPIKES, MASKED, GROUPS)


@triton.jit
def _get(
    message, first, groups, dtype: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """The chunk of a message that :func:`_put` wrote, fp32 halves."""
    if BITS == 16:
        g = tl.arange(0, GROUPS)[:, None]
        elements = message.to(tl.pointer_type(dtype), bitcast=True) + first * (2 * HALF)
        index = g * (2 * HALF) + tl.arange(0, HALF)[None, :]
        lo = tl.load(elements + index, g < groups - first, 0.0, cache_modifier=".cg")
        hi = tl.load(elements + index + HALF, g < groups - first, 0.0, cache_modifier=".cg")
        return lo.to(tl.float32), hi.to(tl.float32)
    else:
        return _read(message, first, groups, BITS, HALF, SPIKES, GROUPS, ".cg")


@triton.jit
def _send_one(
    x_ptr, own_ptr, peers_ptr, peer, first, slot, elements, length, groups, BITS: tl.constexpr, HALF: tl.constexpr,
    SPIKES: tl.constexpr, WHOLE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A chunk of the slice of ``peer`` into the slot that this rank has in that rank's memory; ``WHOLE``: known to be full."""
    FULL: tl.constexpr = GROUPS * 2 * HALF
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    start, stop = _bounds(tl.cast(peer, tl.int32), elements, length, 0, groups, HALF)
    start += first * (2 * HALF)
    message = _message(own_ptr, peers_ptr, peer, slot)
    if WHOLE:
        lo, hi = _load(x_ptr + start, FULL, HALF, GROUPS)
        _put(lo, hi, FULL, message, first, groups, dtype, BITS, HALF, SPIKES, False, GROUPS)
    else:
        valid = _valid(start, stop, FULL)
        lo, hi = _load(x_ptr + start, valid, HALF, GROUPS)
        if valid == FULL:
            _put(lo, hi, valid, message, first, groups, dtype, BITS, HALF, SPIKES, False, GROUPS)
        else:
            _put(lo, hi, valid, message, first, groups, dtype, BITS, HALF, SPIKES, True, GROUPS)


@triton.jit
def _send(
    x_ptr, own_ptr, peers_ptr, chunk, slots, elements, length, groups, nbytes, BITS: tl.constexpr, HALF: tl.constexpr,
    SPIKES: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Reduce leg: a chunk of every other rank's slice into the memory of that rank, of the next rank first.

    Small chunks, which have a multiprocessor each, are sent side by side; large ones one by one, in few registers.
    """
    FULL: tl.constexpr = GROUPS * 2 * HALF
    first = tl.cast(chunk, tl.int64) * GROUPS
    slot = slots + tl.cast(nbytes, tl.int64) * RANK
    side_by_side = FULL <= SIDE_BY_SIDE
    if FULL <= SIDE_BY_SIDE:
        start, stop = _bounds(tl.cast(RANKS - 1, tl.int32), elements, length, 0, groups, HALF)
        side_by_side = stop - start - first * (2 * HALF) >= FULL  # whole in the last slice, so in every one
    if side_by_side:
        for step in tl.static_range(1, RANKS):
            _send_one(
                x_ptr, own_ptr, peers_ptr, (RANK + step) % RANKS, first, slot, elements, length, groups,
                BITS, HALF, SPIKES, True, GROUPS,
            )  # fmt: skip
    else:
        for step in range(1, RANKS):
            _send_one(
                x_ptr, own_ptr, peers_ptr, (RANK + step) % RANKS, first, slot, elements, length, groups,
                BITS, HALF, SPIKES, False, GROUPS,
            )  # fmt: skip


@triton.jit
def _part(
    x_ptr, own_ptr, peer, start, valid, first, slots, groups, nbytes, BITS: tl.constexpr, HALF: tl.constexpr,
    SPIKES: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """What rank ``peer`` adds to a chunk of the own slice."""
    if peer == RANK:
        lo, hi = _load(x_ptr + start, valid, HALF, GROUPS)
    else:
        message = own_ptr + (slots + tl.cast(nbytes, tl.int64) * peer)
        lo, hi = _get(message, first, groups, x_ptr.dtype.element_ty, BITS, HALF, SPIKES, GROUPS)
    return lo, hi


@triton.jit
def _sum(
    x_ptr, own_ptr, peers_ptr, chunk, slots, out_slots, elements, length, groups, nbytes, out_nbytes,
    BITS: tl.constexpr, OUT_BITS: tl.constexpr, HALF: tl.constexpr, SPIKES: tl.constexpr, GROUPS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A chunk of the own slice, summed over the ranks in their order, into the memory of every rank, of the next one first."""
    FULL: tl.constexpr = GROUPS * 2 * HALF
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.cast(chunk, tl.int64) * GROUPS
    start, stop = _bounds(tl.cast(RANK, tl.int32), elements, length, 0, groups, HALF)
    start += first * (2 * HALF)
    valid = _valid(start, stop, FULL)
    lo = tl.zeros((GROUPS, HALF), tl.float32)
    hi = lo
    if FULL <= SIDE_BY_SIDE:
        for peer in tl.static_range(RANKS):
            more_lo, more_hi = _part(
                x_ptr, own_ptr, peer, start, valid, first, slots, groups, nbytes, BITS, HALF, SPIKES, GROUPS, RANK
            )
            lo, hi = lo + more_lo, hi + more_hi
    else:
        for peer in range(RANKS):
            more_lo, more_hi = _part(
                x_ptr, own_ptr, peer, start, valid, first, slots, groups, nbytes, BITS, HALF, SPIKES, GROUPS, RANK
            )
            lo, hi = lo + more_lo, hi + more_hi
    slot = out_slots + tl.cast(out_nbytes, tl.int64) * RANK
    if valid == FULL:  # the compiler takes what is alike for all peers out of these loops
        for step in range(1, RANKS + 1):
            message = _message(own_ptr, peers_ptr, (RANK + step) % RANKS, slot)
            _put(lo, hi, valid, message, first, groups, dtype, OUT_BITS, HALF, SPIKES, False, GROUPS)
    else:
        for step in range(1, RANKS + 1):
            message = _message(own_ptr, peers_ptr, (RANK + step) % RANKS, slot)
            _put(lo, hi, valid, message, first, groups, dtype, OUT_BITS, HALF, SPIKES, True, GROUPS)


@triton.jit
def _receive(
    out_ptr, own_ptr, chunk, out_slots, elements, length, groups, out_nbytes, OUT_BITS: tl.constexpr,
    HALF: tl.constexpr, SPIKES: tl.constexpr, GROUPS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Gather leg: a chunk of every slice, decoded into ``out``."""
    FULL: tl.constexpr = GROUPS * 2 * HALF
    first = tl.cast(chunk, tl.int64) * GROUPS
    for owner in range(RANKS):
        start, stop = _bounds(tl.cast(owner, tl.int32), elements, length, 0, groups, HALF)
        start += first * (2 * HALF)
        message = own_ptr + (out_slots + tl.cast(out_nbytes, tl.int64) * owner)
        lo, hi = _get(message, first, groups, out_ptr.dtype.element_ty, OUT_BITS, HALF, SPIKES, GROUPS)
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
            _await_flags(own_ptr, 0, block, done + i, RANK, RANKS, PROGRAMS)
            before = begin - blocks * per_round
            for chunk in range(before, tl.minimum(before + per_round, chunks)):
                _sum(
                    x_ptr, own_ptr, peers_ptr, chunk, slots, out_slots, elements, length, groups, nbytes, out_nbytes,
                    BITS, OUT_BITS, HALF, SPIKES, GROUPS, RANK, RANKS,
                )  # fmt: skip
            _raise_flags(own_ptr, peers_ptr, 1, block, done + i, RANK, RANKS, PROGRAMS)

        if i > 1:
            _await_flags(own_ptr, 1, block, done + i - 1, RANK, RANKS, PROGRAMS)
            before = begin - 2 * blocks * per_round
            for chunk in range(before, tl.minimum(before + per_round, chunks)):
                _receive(
                    out_ptr, own_ptr, chunk, out_slots, elements, length, groups, out_nbytes,
                    OUT_BITS, HALF, SPIKES, GROUPS, RANKS,
                )  # fmt: skip
    tl.store(counts_ptr + block, done + rounds)
