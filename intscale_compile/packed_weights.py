"""Packed weights of a compiled graph, kept true to the parameters that they came from.

A compiled graph takes codes and scales as inputs, not as frozen constants. At each call the parameters that the caller
passes decide which packed tensors go in: an update in place, a parameter exchanged, or one graph shared by many layers
(regional compilation) therefore never meets stale weights. Nothing is quantized twice for one parameter and version.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from .config import IntScaleConfig
from .tensor import IntScaleTensor
from .tensor_ops import concatenate

DATA_NAMES = tuple(IntScaleTensor.tensor_data_names)


def version_of(tensor: Tensor) -> tuple:
    """Something that changes when the tensor's values may have changed.

    Runs for every weight at every call of a compiled graph. Ask inside ``DisableTorchFunctionSubclass``: otherwise each
    attribute of a tensor subclass costs some microseconds.
    """
    if isinstance(tensor, IntScaleTensor):  # a write through a slice moves only the wrapper's version
        qdata, scale, rows = tensor.qdata, tensor.scale, tensor.per_tensor_scale
        return (_version(tensor), id(qdata), _version(qdata), id(scale), _version(scale), id(rows), _version(rows))
    return (_version(tensor),)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors do not count
        return 0


@dataclass
class _Kept:
    sources: tuple[weakref.ref, ...]
    versions: tuple
    value: Any


_kept: dict[tuple, _Kept] = {}


def _remember(key: tuple, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """``make()``, kept until one of ``tensors`` changes or dies."""
    with DisableTorchFunctionSubclass():
        versions = tuple(version_of(t) for t in tensors)
    kept = _kept.get(key)
    if kept is not None and kept.versions == versions and all(r() is t for r, t in zip(kept.sources, tensors)):
        return kept.value
    value = make()
    forget = lambda _, key=key: _kept.pop(key, None)  # noqa: E731
    _kept[key] = _Kept(tuple(weakref.ref(t, forget) for t in tensors), versions, value)
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
    """Recipe for one packed weight ``[N, K]``: one source, or several whose output rows are concatenated.

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
        """Return the packed weight for the arguments of a call."""
        tensors = [source.tensor(args) for source in self.sources]
        if len(tensors) == 1:
            return self._quantized(tensors[0], self.transposed[0], self.sources[0].name)
        key = ("merged", tuple(map(id, tensors)), self.transposed, dataclasses.astuple(self.config))
        return _remember(key, tensors, lambda: concatenate(self._parts(tensors), 0))

    def _parts(self, tensors: Sequence[Tensor]) -> list[IntScaleTensor]:
        return [self._quantized(t, flag, s.name) for t, flag, s in zip(tensors, self.transposed, self.sources)]

    def _quantized(self, tensor: Tensor, transposed: bool, name: str) -> IntScaleTensor:
        if isinstance(tensor, IntScaleTensor):
            return tensor.replaced(transposed=False) if tensor.transposed else tensor
        key = ("quantized", id(tensor), transposed, dataclasses.astuple(self.config))

        def quantize() -> IntScaleTensor:
            with torch.no_grad():
                weight = tensor.detach()
                return IntScaleTensor.from_hp(weight.t() if transposed else weight, self.config, name=name)

        return _remember(key, (tensor,), quantize)


def merged(recipes: Sequence[Packed]) -> Packed:
    """The recipe for the rows of several recipes, one after another."""
    return Packed(
        tuple(s for r in recipes for s in r.sources), tuple(t for r in recipes for t in r.transposed), recipes[0].config
    )


@dataclass(frozen=True)
class ConcatenatedBias:
    """Recipe for the bias of merged siblings: constant vectors ``[N_i]`` one after another."""

    sources: tuple[WeightSource, ...]

    @property
    def key(self) -> tuple:
        """Tells this recipe from the others of one graph."""
        return "bias", self.sources

    def resolve(self, args: Sequence[Any]) -> Tensor:
        """The joined bias for the arguments of a call."""
        tensors = [source.tensor(args) for source in self.sources]
        with torch.no_grad():
            return _remember(
                ("bias", tuple(map(id, tensors))), tensors, lambda: torch.cat([t.detach() for t in tensors])
            )


class BoundGraph:
    """A compiled graph behind the signature of the original one: swaps weights for packed tensors at each call.

    Args:
        kept: indices of the original inputs that the compiled graph still takes.
        packed: recipe and part (a data name of ``IntScaleTensor``, or None for the value itself) of each packed input.

    ``compiled`` is set afterwards; it takes the kept inputs, then the packed ones.
    """

    def __init__(self, kept: Sequence[int], packed: Sequence[tuple[Any, Optional[str]]]):
        self.compiled: Callable
        self._kept = tuple(kept)
        self._packed = tuple(packed)
        self._watched = sorted({s.index for recipe, _ in packed for s in recipe.sources if s.index is not None})
        self._seen: list[tuple[int, weakref.ref, tuple]] = []
        self._values: list[Tensor] = []

    def inputs(self, args: Sequence[Any], convert: Callable[[Tensor], Tensor] = lambda value: value) -> list[Any]:
        """The arguments of the compiled graph for those of the original one; ``convert`` sees the packed ones."""
        with DisableTorchFunctionSubclass():
            if not self._values or any(r() is not args[i] or version_of(args[i]) != v for i, r, v in self._seen):
                self._values = self._resolve(args)
                self._seen = [(i, weakref.ref(args[i]), version_of(args[i])) for i in self._watched]
        return [*(args[i] for i in self._kept), *map(convert, self._values)]

    def _resolve(self, args: Sequence[Any]) -> list[Tensor]:
        values = []
        for recipe, part in self._packed:
            value = recipe.resolve(args)
            values.append(value if part is None else getattr(value, part))
        return values

    def __call__(self, *args: Any) -> Any:
        """Run the compiled graph on the arguments of the original one."""
        return self.compiled(*self.inputs(args))
