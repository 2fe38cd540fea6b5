"""Packed weights of a compiled graph, kept true to the parameters that they came from.

A compiled graph takes codes and scales as inputs, not as frozen constants. At each call the parameters that the caller
passes decide which packed tensors go in: an update in place, a parameter exchanged, or one graph shared by many layers
(regional compilation) therefore never meets stale weights. Nothing is quantized twice for one parameter and version.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, cast

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from ..config import IntScaleConfig
from ..errors import CompileError
from ..tensors.activation_parts import same_part
from ..tensors.fields import DATA_NAMES
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.joined_rows import joined_in_place
from ..tensors.operators import concatenate


def version_of(tensor: Tensor) -> tuple:
    """Something that changes when the tensor's values may have changed. Ask inside ``DisableTorchFunctionSubclass``."""
    if isinstance(tensor, IntScaleTensor):  # a write through a slice moves only the wrapper's version
        parts = [part for part in _data(tensor) if part is not None]
        return (_version(tensor), *map(id, parts), *map(_version, parts))
    return (_version(tensor),)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors do not count
        return 0


_data = operator.attrgetter(*DATA_NAMES)


def _anchor(tensor: Tensor) -> Tensor:
    """What to hold a weak reference to: ``Module.to`` refuses to exchange a tensor subclass that has one."""
    return tensor.qdata if isinstance(tensor, IntScaleTensor) else tensor


@dataclass
class _Kept:
    sources: tuple[weakref.ref, ...]
    versions: tuple
    value: Any


_kept: dict[tuple, _Kept] = {}


def _remember(kind: str, tensors: Sequence[Tensor], how: tuple, make: Callable[[], Any]) -> Any:
    """``make()``, kept until one of ``tensors`` changes or dies."""
    anchors = [_anchor(t) for t in tensors]
    key = (kind, tuple(map(id, anchors)), how)
    with DisableTorchFunctionSubclass():
        versions = tuple(version_of(t) for t in tensors)
    kept = _kept.get(key)
    if kept is not None and kept.versions == versions and all(r() is t for r, t in zip(kept.sources, anchors)):
        return kept.value
    value = make()
    forget = lambda _, key=key: _kept.pop(key, None)  # noqa: E731
    _kept[key] = _Kept(tuple(weakref.ref(t, forget) for t in anchors), versions, value)
    return value


@dataclass(frozen=True)
class WeightSource:
    """Where the caller's weight comes from: input ``index`` of the graph, or a constant attribute of it."""

    name: str
    index: Optional[int] = None
    constant: Optional[Tensor] = dataclasses.field(default=None, compare=False)

    def tensor(self, args: Sequence[Any]) -> Tensor:
        """The weight among the arguments of a call."""
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
            return _remember("merged", parts, (), lambda: concatenate(parts, 0).replaced(transposed=False))

    def _quantized(self, source: WeightSource, tensor: Tensor, transposed: bool) -> IntScaleTensor:
        if isinstance(tensor, IntScaleTensor):
            return tensor

        def quantize() -> IntScaleTensor:
            weight = tensor.detach()
            packed = IntScaleTensor.from_hp(weight.mT if transposed else weight, self.config, name=source.name)
            return packed.detach()  # its data are no views of temporaries, so they can move into a merged weight

        return _remember("quantized", [tensor], (transposed, dataclasses.astuple(self.config)), quantize)


def merged(recipes: Sequence[Packed]) -> Packed:
    """The recipe for the rows of several recipes, one after another."""
    return Packed(
        tuple(s for r in recipes for s in r.sources), tuple(t for r in recipes for t in r.transposed), recipes[0].config
    )


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
            return _remember("bias", tensors, (self.first_rows, self.rows), lambda: self._join(tensors))

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        joined = tensors[0].detach().new_zeros(self.rows)
        for first, tensor in zip(self.first_rows, tensors):
            joined[first : first + tensor.shape[0]] = tensor.detach()
        return joined
