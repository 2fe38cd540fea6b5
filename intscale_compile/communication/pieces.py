"""Which elements a message stands for: a range of groups in the slice of each rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """The elements ``owner * length + begin, ...`` of a 1-D tensor, ``groups`` groups of them, for every owner of a slice.

    Args:
        elements: length of the tensor. The slices of the last owners may end early or be empty.
        length: elements of a slice.
        begin: where the piece begins in each slice, a multiple of the group size.
        groups: number of groups; the last one may be incomplete in a slice that ends there.
        group_size: elements of a group.
    """

    elements: int
    length: int
    begin: int
    groups: int
    group_size: int

    def bounds(self, owner: int) -> tuple[int, int]:
        """First element of this piece in the slice of ``owner``, and the one behind its last; equal where there is none."""
        start = owner * self.length + self.begin
        stop = min(start + self.groups * self.group_size, (owner + 1) * self.length, self.elements)
        return (start, stop) if start < stop else (0, 0)


def pieces(elements: int, length: int, group_size: int, groups_at_once: int) -> list[Piece]:
    """The pieces of at most ``groups_at_once`` groups that cover every slice of ``length`` elements."""
    groups = -(-length // group_size)
    starts = range(0, groups, groups_at_once)
    return [Piece(elements, length, s * group_size, min(groups_at_once, groups - s), group_size) for s in starts]
