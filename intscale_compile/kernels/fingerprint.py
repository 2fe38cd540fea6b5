"""Whether a tensor's values have changed, found out without reading them all.

A write under ``torch.no_grad()`` moves a tensor's version. One through ``.data``, through numpy, by a fused optimizer, or to an
inference tensor does not: ``state_of`` adds the address, and :class:`Sample` a look at 1 KB of the memory, in 16 pieces that
lie evenly over it (at all of it, where it is no longer than that). A write to most of the elements changes some of these
bytes; one to single rows or elements may not, and nothing here notices it.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Optional

import numpy as np
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PIECES, PIECE_BYTES = 16, 64  # a piece is a cache line
SAMPLED_BYTES = PIECES * PIECE_BYTES


class Pieces(NamedTuple):
    """Where a tensor's memory is looked at: ``words`` of 4 bytes in pieces of 64 bytes, ``step`` bytes from one to the next."""

    address: int
    words: int
    step: int


def version_of(tensor: Tensor) -> int:
    """The number of writes that PyTorch knows of; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Address and version of a plain tensor; a fake one has no address."""
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr(), version_of(tensor)


def pieces_of(tensor: Tensor) -> Optional[Pieces]:
    """The pieces of a tensor with memory: addresses and sizes are multiples of 4 bytes from its first element on; else None.

    Of a tensor with gaps, such as a slice of columns, the gaps are looked at too.
    """
    if isinstance(tensor, FakeTensor) or tensor.is_meta or not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    address, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
    start = -(-address // 4) * 4
    whole = (end - start) // 4 * 4
    if not address or whole <= 0:
        return None
    if whole <= SAMPLED_BYTES:
        return Pieces(start, whole // 4, PIECE_BYTES)
    return Pieces(start, SAMPLED_BYTES // 4, (whole - PIECE_BYTES) // (PIECES - 1) // PIECE_BYTES * PIECE_BYTES)


class Sample:
    """What some of a CPU tensor's memory held when this was made. Holds no reference to the memory.

    Ask :meth:`same` only while the tensor lives and has the address that it had (``state_of``).
    """

    __slots__ = ("_bytes", "_expected")

    def __init__(self, pieces: Pieces):
        together = pieces.step == PIECE_BYTES
        shape = (1, 4 * pieces.words) if together else (PIECES, PIECE_BYTES)
        memory = (ctypes.c_char * (pieces.step * (shape[0] - 1) + shape[1])).from_address(pieces.address)
        self._bytes = np.ndarray(shape, np.uint8, memory, 0, (pieces.step, 1)).tobytes  # type: ignore[arg-type]
        self._expected = self._bytes()

    def same(self) -> bool:
        """Whether the memory holds the same now."""
        return self._bytes() == self._expected


def sample_of(tensor: Tensor) -> Optional[Sample]:
    """A sample of a CPU tensor; None for tensors on other devices and without memory."""
    pieces = pieces_of(tensor) if tensor.device.type == "cpu" else None
    return None if pieces is None else Sample(pieces)
