"""One small kernel that compares samples of many weights with what they were, and tells the host without being waited for.

A row of the table, int64 ``[n, 4]``: address of the weight's first piece, bytes from one piece to the next, number of 4-byte
words to look at, and address of the int32 ``[SAMPLED_WORDS]`` that they were.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .fingerprint import PIECE_BYTES, SAMPLED_BYTES
from .launching import launch

SAMPLED_WORDS, PIECE_WORDS = SAMPLED_BYTES // 4, PIECE_BYTES // 4


@triton.jit
def fingerprint_kernel(table_ptr, flags_ptr, COMPARE: tl.constexpr, WORDS: tl.constexpr, PIECE: tl.constexpr):
    """Program ``i`` sets ``flags[0]`` and ``flags[1 + i]`` where the sample differs; without COMPARE it stores the sample."""
    i = tl.program_id(0)
    address = tl.load(table_ptr + 4 * i)
    step = tl.load(table_ptr + 4 * i + 1)
    count = tl.load(table_ptr + 4 * i + 2)
    known = tl.load(table_ptr + 4 * i + 3).to(tl.pointer_type(tl.int32), bitcast=True)
    word = tl.arange(0, WORDS)
    place = address + (word // PIECE) * step + (word % PIECE) * 4
    mask = word < count
    now = tl.load(place.to(tl.pointer_type(tl.int32), bitcast=True), mask=mask, other=0)
    if COMPARE:
        before = tl.load(known + word, mask=mask, other=0)
        if tl.max((now != before).to(tl.int32), 0) > 0:
            tl.store(flags_ptr, 1)
            tl.store(flags_ptr + 1 + i, 1)
    else:
        tl.store(known + word, now)


def run_fingerprints(table: Tensor, flags: Tensor, compare: bool) -> None:
    """Compare the weights of a table with their samples, or (``compare=False``) store these.

    Args:
        table: int64 ``[n, 4]`` on the GPU of the weights.
        flags: int32 ``[1 + n]`` or longer in pinned memory of the host; entries are only ever set to 1.
    """
    count = table.shape[0]
    launch(
        fingerprint_kernel, (count,), table, flags, COMPARE=compare, WORDS=SAMPLED_WORDS, PIECE=PIECE_WORDS, num_warps=4
    )
