"""What travels between ranks in a quantized collective: the wire format, and the layout of one message in bytes.

Each leg of the two-step all-reduce (Flash Communication, arXiv 2412.04964) sends a slice as ONE message of uint8, planar:

    codes | group scales bf16 [G] | minimums bf16 [G] | with spikes: values bf16 [G, 2], positions uint8 [G, 2] | padding

for ``G`` groups of ``g`` elements; the padding fills up to a multiple of 16 bytes. Codes of ``b`` bits:

* 8 bits: a byte per element, in order, 254 at most.
* 4 bits: byte ``j`` of a group is ``code[j] | code[j + g/2] << 4``, for ``j < g/2``.
* 5 bits (bit splitting of arXiv 2508.03760, 4 + 1): the low four bits of all groups as above, then a plane of the high bits:
  byte ``j < g/8`` of a group is ``sum_k high(code[j + k * g/8]) << k``.
* 6 bits (4 + 2): the low four bits of all groups as above, then a plane of the two high bits: byte ``j < g/4`` of a group is
  ``high(code[2j]) | high(code[2j + 1]) << 2 | high(code[2j + g/2]) << 4 | high(code[2j + 1 + g/2]) << 6``: neighbours of both
  halves, which are in registers of one thread of a GPU.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from ..errors import ConfigError

BITS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4}
GROUP_SIZE = 128  # consecutive elements that share a group scale and a minimum
ALIGNMENT = 16  # bytes; messages lie behind each other and are read in words of this size
_TEXT = re.compile(r"(?P<name>int[4568])(?P<spikes>-spikes)?")


def largest_code(bits: int) -> int:
    """The largest code of so many bits; no byte of 8-bit codes is 255, which leaves a word of 32 bits that no message holds."""
    return 254 if bits == 8 else 2**bits - 1


@dataclass(frozen=True)
class WireFormat:
    """How a quantized collective represents its message.

    Args:
        bits: of the codes, 4, 5, 6 or 8, in both legs of an all-reduce.
        spike_reserving: the smallest and the largest element of each group travel in bf16, and the codes cover the range of
            the others (arXiv 2508.03760).

    Raises:
        ConfigError: a number of bits that has no name in :meth:`parse`.
    """

    bits: int
    spike_reserving: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS.values():
            raise ConfigError(f"no wire format has {self.bits} bits: use one of {sorted(BITS.values())}.")

    @classmethod
    @functools.lru_cache(maxsize=64)
    def parse(cls, text: str) -> WireFormat:
        """The format of a name of ``BITS``, then ``"-spikes"`` or nothing.

        Raises:
            ConfigError: any other text.
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(
                f"{text!r} is no wire format: use int8, int6, int5 or int4, optionally followed by -spikes, as in 'int8' or "
                "'int8-spikes'."
            )
        return cls(BITS[match["name"]], match["spikes"] is not None)

    def __str__(self) -> str:
        return f"int{self.bits}" + ("-spikes" if self.spike_reserving else "")

    @property
    def group_size(self) -> int:
        """Elements of a group."""
        return GROUP_SIZE

    def slice_elements(self, elements: int, ranks: int) -> int:
        """Elements of the slice that one rank sums: whole groups; the last slices may be partial or empty."""
        return -(-elements // (ranks * self.group_size)) * self.group_size

    def layout(self, groups: int) -> MessageLayout:
        """Layout of a message of so many groups, in either leg."""
        return MessageLayout(groups, self.bits, self.spike_reserving)


@dataclass(frozen=True)
class Elements:
    """The form of a lossless collective: a message holds elements of 16 bits as they are (bf16 or fp16), without parameters.

    Stands where the fused kernel takes a :class:`WireFormat`.
    """

    bits: int = 16
    group_size: int = GROUP_SIZE

    def slice_elements(self, elements: int, ranks: int) -> int:
        """Elements of the slice that one rank sums: whole groups; the last slices may be partial or empty."""
        return -(-elements // (ranks * self.group_size)) * self.group_size

    def layout(self, groups: int) -> MessageLayout:
        """Layout of a message of so many groups, in either leg."""
        return MessageLayout(groups, self.bits, False)


@dataclass(frozen=True)
class MessageLayout:
    """Offsets in bytes of the parts of one message of ``groups`` groups; of 16 bits: the elements alone."""

    groups: int
    bits: int
    spikes: bool

    @property
    def group_size(self) -> int:
        """Elements of a group."""
        return GROUP_SIZE

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, both planes of 5 and of 6 bits."""
        return self.groups * self.group_size * self.bits // 8

    @property
    def high_plane(self) -> int:
        """Where the plane of the high bits of 5-bit and 6-bit codes begins."""
        return self.groups * self.group_size // 2

    @property
    def scales(self) -> int:
        """Where the group scales begin."""
        return self.code_bytes

    @property
    def minimums(self) -> int:
        """Where the minimums begin."""
        return self.scales + 2 * self.groups

    @property
    def spike_values(self) -> int:
        """Where the values of the spikes begin."""
        return self.minimums + 2 * self.groups

    @property
    def spike_positions(self) -> int:
        """Where the positions of the spikes begin."""
        return self.spike_values + 4 * self.groups

    @property
    def nbytes(self) -> int:
        """Bytes of the whole message, a multiple of 16."""
        if self.bits == 16:
            return self.code_bytes
        end = self.spike_positions + 2 * self.groups if self.spikes else self.spike_values
        return -(-end // ALIGNMENT) * ALIGNMENT
