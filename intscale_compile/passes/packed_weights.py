"""Packed weights of a compiled graph, kept true to the parameters that they came from.

A compiled graph takes codes and scales as inputs, not as frozen constants. At each call the parameters that the caller
passes decide which packed tensors go in, also where one graph is shared by many layers (regional compilation). Packed tensors
that are copies are made anew when a parameter has changed; :mod:`~.kept` says what is noticed. Nothing is quantized twice for
one state of a parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, cast

import torch
from torch import Tensor

from .. import format as fmt
from ..config import IntScaleConfig
from ..errors import CompileError
from ..tensors.activation_parts import same_part
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.joined_rows import joined_in_place
from ..tensors.operators import concatenate
from .kept import remember


@dataclass(frozen=True)
class WeightSource:
    """Where the caller's weight comes from: input ``index`` of the graph, or a constant attribute of it.

    ``rows`` are the first output row and the one after the last, where a product reads a part of the weight.
    """

    name: str
    index: Optional[int] = None
    constant: Optional[Tensor] = dataclasses.field(default=None, compare=False)
    rows: Optional[tuple[int, int]] = None

    def tensor(self, args: Sequence[Any]) -> Tensor:
        """The weight among the arguments of a call, all rows of it."""
        return self.constant if self.index is None else args[self.index]  # type: ignore[return-value]


@dataclass(frozen=True)
class Packed:
    """Recipe for one packed weight ``[N, K]`` or stack ``[E, N, K]``: one source, or several whose output rows are concatenated.

    Attributes:
        sources: the weights, in row order.
        transposed: per source, whether it is kept as ``[K, N]``.
        config: how plain sources are quantized.
    """

    sources: tuple[WeightSource, ...]
    transposed: tuple[bool, ...]
    config: IntScaleConfig

    @property
    def key(self) -> tuple:
        """Tells this recipe from the others of one graph, which share one configuration."""
        return "weight", self.sources, self.transposed

    def resolve(self, args: Sequence[Any]) -> IntScaleTensor:
        """Return the packed weight for the arguments of a call.

        Sources of a merged weight become row slices of it where they can, so that there is one copy of their data.
        """
        with torch.no_grad():
            parts = [self._quantized(s, s.tensor(args), flag) for s, flag in zip(self.sources, self.transposed)]
            if len(parts) == 1:
                return parts[0].replaced(transposed=False) if parts[0].transposed else parts[0]
            joined = joined_in_place(parts)
            if joined is not None:
                return joined
            return remember("merged", parts, (), lambda: concatenate(parts, 0).replaced(transposed=False))

    def _quantized(self, source: WeightSource, tensor: Tensor, transposed: bool) -> IntScaleTensor:
        if source.rows is not None:
            whole = dataclasses.replace(source, rows=None)
            return remember(
                "rows", [tensor], (source.rows, *self._how(transposed)),
                lambda: _rows_of(self._quantized(whole, tensor, transposed), *source.rows),  # type: ignore[misc]
            )  # fmt: skip
        if isinstance(tensor, IntScaleTensor):
            return tensor

        def quantize() -> IntScaleTensor:
            weight = tensor.detach()
            packed = IntScaleTensor.from_hp(weight.mT if transposed else weight, self.config, name=source.name)
            return packed.detach()  # its data are no views of temporaries, so they can move into a merged weight

        return remember("quantized", [tensor], self._how(transposed), quantize)

    def _how(self, transposed: bool) -> tuple:
        return transposed, dataclasses.astuple(self.config)


def _rows_of(weight: IntScaleTensor, start: int, end: int) -> IntScaleTensor:
    """Some output rows of a weight, never transposed; they share its memory unless they cut through tiles."""
    stored = weight.replaced(transposed=False)
    whole_tiles = start % fmt.TILE_N == 0 and (end % fmt.TILE_N == 0 or end == weight.out_features)
    stored = stored if whole_tiles else stored.to_packing("plain")
    return stored[start:end]  # type: ignore[return-value]


def merged(recipes: Sequence[Packed]) -> Packed:
    """The recipe for the rows of several recipes, one after another. Rows of one weight that follow each other are one source."""
    sources: list[tuple[WeightSource, bool]] = []
    for source, transposed in ((s, t) for r in recipes for s, t in zip(r.sources, r.transposed)):
        before = sources[-1][0] if sources else None
        if before is not None and source.rows is not None and before.rows is not None:
            joined = dataclasses.replace(before, rows=(before.rows[0], source.rows[1]))
            if dataclasses.replace(source, rows=joined.rows) == joined and before.rows[1] == source.rows[0]:
                sources[-1] = joined, transposed
                continue
        sources.append((source, transposed))
    return Packed(tuple(s for s, _ in sources), tuple(t for _, t in sources), recipes[0].config)


_PARTED = {  # what weights no longer share, and the mend
    "act_pre_scale": ("static activation scale", "calibrate them on one input"),
    "input_order": ("input order", "import them from one checkpoint"),
}


@dataclass(frozen=True)
class ActivationPart:
    """Recipe for what says how the activation of one weight is taken, or that of several that read one quantized activation.

    The weights then share one tensor, so that a write to it is seen by all of them, and one of one's own is noticed.

    Attributes:
        sources: the weights.
        part: ``"act_pre_scale"`` or ``"input_order"``.
    """

    sources: tuple[WeightSource, ...]
    part: str

    @property
    def key(self) -> tuple:
        """Tells this recipe from the others of one graph."""
        return self.part, self.sources

    def resolve(self, args: Sequence[Any]) -> IntScaleTensor:
        """A weight with the part, among the arguments of a call.

        Raises:
            CompileError: the weights have different ones, though they had one when the graph was compiled.
        """
        first, *others = (cast(IntScaleTensor, source.tensor(args)) for source in self.sources)
        for source, other in zip(self.sources[1:], others):
            if getattr(other, self.part) is not getattr(first, self.part):
                if not same_part(first, other, self.part):
                    what, mend = _PARTED[self.part]
                    raise CompileError(
                        f"{self.sources[0].name} and {source.name} share one activation in the compiled graph, but no "
                        f"longer one {what}: {mend}, or call torch._dynamo.reset()."
                    )
                setattr(other, self.part, getattr(first, self.part))
        return first


@dataclass(frozen=True)
class ConcatenatedBias:
    """Recipe for the bias of merged siblings: constant vectors ``[N_i]`` at their first rows, zero for siblings without.

    Adding a zero is exact: what it is added to is a product of the int32 accumulator, which is never a negative zero.
    """

    sources: tuple[WeightSource, ...]
    first_rows: tuple[int, ...]
    rows: int

    @property
    def key(self) -> tuple:
        """Tells this recipe from the others of one graph."""
        return "bias", self.sources, self.first_rows, self.rows

    def resolve(self, args: Sequence[Any]) -> Tensor:
        """The joined bias for the arguments of a call."""
        tensors = [source.tensor(args) for source in self.sources]
        with torch.no_grad():
            return remember("bias", tensors, (self.first_rows, self.rows), lambda: self._join(tensors))

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        joined = tensors[0].detach().new_zeros(self.rows)
        for first, tensor in zip(self.first_rows, tensors):
            joined[first : first + tensor.shape[0]] = tensor.detach()
        return joined
