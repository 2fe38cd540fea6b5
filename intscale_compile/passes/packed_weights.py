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
from ..tensors.intscale_tensor import DATA_NAMES, IntScaleTensor
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
_plain_version = operator.attrgetter("_version")


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


@dataclass
class _Binding:
    """The packed inputs for one set of weights.

    Attributes:
        versions: of the weights whose data the packed inputs are copies of, from the arguments of a call.
        bound: what ``versions`` gave when the copies were made.
        values: packed inputs that are not inner tensors of a weight themselves.
        pick: takes the inputs of the compiled graph out of ``(*args, *inner tensors of the weights, *values)``.
        alive: weak references that drop this binding when a weight is gone.
    """

    versions: Callable[[Sequence[Any]], tuple]
    bound: tuple
    values: list[Tensor]
    pick: Callable[[Sequence[Any]], tuple]
    alive: list[weakref.ref]


class BoundGraph:
    """A compiled graph behind the signature of the original one: swaps weights for packed tensors at each call.

    A call looks at the identity of every inner tensor of its weights. Packed inputs that are these tensors, or that they
    are row slices of, see every write; versions are asked only where a packed input is a copy. What was bound for one
    set of weights is found again when the graph serves many layers.

    Args:
        kept: indices of the original inputs that the compiled graph still takes.
        packed: recipe and part (a data name of ``IntScaleTensor``, or None for the value itself) of each packed input.

    ``compiled`` is set afterwards; it takes the kept inputs, then the packed ones.

    Raises:
        CompileError: at a call, if an inner tensor of a weight was exchanged for one of another layout.
    """

    def __init__(self, kept: Sequence[int], packed: Sequence[tuple[Any, Optional[str]]]):
        self.compiled: Callable
        self._kept = tuple(kept)
        self._packed = tuple(packed)
        self._bindings: dict[tuple[int, ...], _Binding] = {}
        self._layouts: list[tuple] = []
        self._quantized: Optional[Callable[[Sequence[Any]], tuple]] = None
        self._plain: Callable[[Sequence[Any]], tuple]
        self._parts: list[Callable[[IntScaleTensor], tuple]]

    def inputs(self, args: Sequence[Any], convert: Callable[[Tensor], Tensor] = lambda value: value) -> list[Any]:
        """The arguments of the compiled graph for those of the original one; ``convert`` sees the packed ones."""
        given = self._given(args)
        packed = given[len(self._kept) :]
        self._layouts = list(map(_layout, packed))
        return [*given[: len(self._kept)], *map(convert, packed)]

    def _given(self, args: Sequence[Any]) -> tuple:
        with DisableTorchFunctionSubclass():  # otherwise each attribute of a tensor subclass costs some microseconds
            inner = self._inner(args)
            binding = self._bindings.get((*map(id, inner), *map(id, self._plain(args))))
            if binding is None or binding.versions(args) != binding.bound:
                binding = self._bind(args)
                inner = self._inner(args)  # binding may have exchanged inner tensors for slices of merged ones
            return binding.pick((*args, *inner, *binding.values))

    def _inner(self, args: Sequence[Any]) -> list[Tensor]:
        """Inner tensors of the quantized weights among the arguments."""
        if self._quantized is None:  # Dynamo guards types and attributes of inputs, so the first call decides
            watched = sorted({s.index for recipe, _ in self._packed for s in recipe.sources if s.index is not None})
            self._plain = _picker([i for i in watched if not isinstance(args[i], IntScaleTensor)])
            quantized = [i for i in watched if isinstance(args[i], IntScaleTensor)]
            self._quantized = _picker(quantized)
            self._parts = [operator.attrgetter(*args[i].data_names) for i in quantized]
        return [part for parts, weight in zip(self._parts, self._quantized(args)) for part in parts(weight)]

    def _bind(self, args: Sequence[Any]) -> _Binding:
        given, copied = [], set()
        for recipe, part in self._packed:
            value = recipe.resolve(args)
            given.append(value if part is None else getattr(value, part))
            copied |= _copied(given[-1], recipe, part, args)
        self._check(given)
        inner, plain = self._inner(args), self._plain(args)
        place = {id(tensor): len(args) + i for i, tensor in enumerate(inner)}
        values = [value for value in given if id(value) not in place]
        place.update((id(value), len(args) + len(inner) + i) for i, value in enumerate(values))
        versions = _version_getter(sorted(copied), args)
        key = (*map(id, inner), *map(id, plain))
        forget = lambda _, key=key: self._bindings.pop(key, None)  # noqa: E731
        binding = _Binding(
            versions,
            versions(args),
            values,
            _picker([*self._kept, *(place[id(value)] for value in given)]),
            [weakref.ref(tensor, forget) for tensor in (*inner, *plain)],
        )
        self._bindings[key] = binding
        return binding

    def _check(self, given: Sequence[Tensor]) -> None:
        """The inner tensors of a weight have no guards of their own."""
        for value, layout, (recipe, part) in zip(given, self._layouts, self._packed):
            if _layout(value) != layout:
                raise CompileError(
                    f"{recipe.sources[0].name}: {part or recipe.key[0]} has changed since its graph was compiled, from "
                    f"(shape, strides, dtype, device) {layout} to {_layout(value)}: call torch._dynamo.reset()."
                )

    def __call__(self, *args: Any) -> Any:
        """Run the compiled graph on the arguments of the original one."""
        return self.compiled(*self._given(args))


def _layout(value: Tensor) -> tuple:
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple]:
    """A function that returns the entries at ``indices`` as a tuple."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda entries: tuple(entries[i] for i in indices)


def _copied(value: Tensor, recipe: Any, part: Optional[str], args: Sequence[Any]) -> set[int]:
    """Indices of the inputs that ``value`` is a copy of, so that it does not see a write to them."""
    memory = value.untyped_storage().data_ptr()
    copied = set()
    for source in recipe.sources:
        weight = source.tensor(args)
        inner = getattr(weight, part) if part is not None and isinstance(weight, IntScaleTensor) else None
        shared = inner is not None and inner.untyped_storage().data_ptr() == memory
        if source.index is not None and not shared:
            copied.add(source.index)
    return copied


def _version_getter(indices: Sequence[int], args: Sequence[Any]) -> Callable[[Sequence[Any]], tuple]:
    """A function from the arguments of a call to the versions of those at ``indices``."""
    pick = _picker(indices)
    if any(isinstance(args[i], IntScaleTensor) or args[i].is_inference() for i in indices):
        return lambda args: tuple(map(version_of, pick(args)))
    return lambda args: tuple(map(_plain_version, pick(args)))
