"""Fold layers that repeat: those of a block stand for all blocks whose layers have the same decisions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..passes.collective_report import CollectiveReport
from .blocks import block_of
from .records import LayerReport

LEAST = 3  # blocks alike: fewer are shorter to read one by one


@dataclass(frozen=True)
class Fold:
    """Layers that are shown as one.

    Attributes:
        name: with all numbers of the block in place of one, as ``model.layers.0..31.mlp.up_proj.weight``.
        layers: these, the first of which stands for the others.
    """

    name: str
    layers: tuple[LayerReport, ...]

    @property
    def scale_range(self) -> tuple[int, int]:
        """Least and greatest group scale of all."""
        ranges = [layer.scale_range for layer in self.layers if layer.scale_range]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    @property
    def headroom_bits(self) -> float:
        """That of the worst."""
        return min(layer.headroom_bits for layer in self.layers if layer.headroom_bits is not None)

    @property
    def gemm(self) -> str:
        """Numbers of the GEMMs, first and last."""
        numbers = sorted({layer.gemm for layer in self.layers if layer.gemm is not None})
        return "-" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"


def numbers(values: Sequence[int]) -> str:
    """``0..3,5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def joined(blocks: Sequence[str]) -> str:
    """``model.layers.0..31`` for the names of blocks of one list."""
    stack = blocks[0].rpartition(".")[0]
    last = numbers([int(block.rpartition(".")[2]) for block in blocks])
    return f"{stack}.{last}" if stack else last


def alike_blocks(layers: Sequence[LayerReport], blocks: Sequence[str]) -> list[tuple[str, ...]]:
    """Blocks by what was decided for their layers, those with none left out."""
    known = frozenset(blocks)
    inside: dict[str, list[tuple]] = {}
    for layer in layers:
        block = block_of(layer.name, known)
        if block:
            inside.setdefault(block, []).append(_decision(layer, block))
    groups: dict[tuple, list[str]] = {}
    for block, decisions in inside.items():
        groups.setdefault((block.rpartition(".")[0], *decisions), []).append(block)
    return [tuple(group) for group in groups.values()]


def _decision(layer: LayerReport, block: str) -> tuple:
    same = dataclasses.replace(
        layer, name="", gemm=None, scale_range=None, headroom_bits=None, scale_counts={}, graph=None
    )
    return layer.name[len(block) :], *(str(value) for value in dataclasses.astuple(same))


def fold(layers: Sequence[LayerReport], blocks: Sequence[str], least: int = LEAST) -> list[Fold]:
    """Layers in order, those of blocks alike in place of the first of these."""
    known = frozenset(blocks)
    groups = {group[0]: group for group in alike_blocks(layers, blocks) if len(group) >= least}
    hidden = {block for group in groups.values() for block in group[1:]}
    by_block: dict[str, list[LayerReport]] = {}
    for layer in layers:
        by_block.setdefault(block_of(layer.name, known), []).append(layer)
    place = dict.fromkeys(by_block, 0)
    folds = []
    for layer in layers:
        block = block_of(layer.name, known)
        at, place[block] = place[block], place[block] + 1
        if block in groups and block:
            members = tuple(by_block[other][at] for other in groups[block])
            folds.append(Fold(joined(groups[block]) + layer.name[len(block) :], members))
        elif block not in hidden:
            folds.append(Fold(layer.name, (layer,)))
    return folds


@dataclass(frozen=True)
class FoldedCollective:
    """Collectives of repeated layers that are alike, shown as one."""

    name: str
    first: CollectiveReport
    count: int


def fold_collectives(
    found: Sequence[CollectiveReport], blocks: Sequence[str], least: int = LEAST
) -> list[FoldedCollective]:
    """Collectives in order, those of at least ``least`` blocks that are alike in place of the first of these."""
    known = frozenset(blocks)
    groups: dict[tuple, list[CollectiveReport]] = {}
    for one in found:
        block = block_of(one.name, known)
        leaf = re.sub(r"_\d+$", "", one.name[len(block) :])
        same = dataclasses.astuple(dataclasses.replace(one, name=leaf, graph=0))
        groups.setdefault((block.rpartition(".")[0], bool(block), *same), []).append(one)
    folds = []
    for (_, inside, leaf, *_), members in groups.items():
        names = list(dict.fromkeys(block_of(one.name, known) for one in members))
        if inside and len(names) >= least:
            folds.append((members[0], FoldedCollective(joined(names) + leaf, members[0], len(members))))
        else:
            folds += [(one, FoldedCollective(one.name, one, 1)) for one in members]
    place = {id(one): i for i, one in enumerate(found)}
    return [fold for _, fold in sorted(folds, key=lambda pair: place[id(pair[0])])]
