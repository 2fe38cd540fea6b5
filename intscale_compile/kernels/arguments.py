"""The arguments of our ops, each list in one place: a named tuple per op gives its schema, its order and its defaults.

    torch.library.define(f"intscale::w4a8_linear{schema(LinearArguments)}")
    @takes(LinearArguments)                     an implementation that reads its arguments by name
    arguments_of(LinearArguments, node)         those of a node of a graph: nodes where a call has tensors
    gradients(LinearArguments, bias=grad)       what a backward returns

What the arguments mean is said where the op is defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, TypeVar, Union, get_type_hints

import torch
from torch import Tensor, fx

_TYPES = {
    Tensor: "Tensor",
    Optional[Tensor]: "Tensor?",
    int: "int",
    str: "str",
    bool: "bool",
    torch.dtype: "ScalarType",
}


class AccumulateArguments(NamedTuple):
    """Of ``intscale::w4a8_accumulate``."""

    xq: Tensor
    qdata: Tensor
    scale: Tensor
    out_features: int
    group_size: int
    scale_bits: int
    packing: str
    abi: int
    zero_point: Optional[Tensor] = None


class LinearArguments(NamedTuple):
    """Of ``intscale::w4a8_linear``."""

    xq: Tensor
    token_scale: Tensor
    qdata: Tensor
    scale: Tensor
    row_scale: Tensor
    bias: Optional[Tensor]
    out_features: int
    group_size: int
    scale_bits: int
    packing: str
    dtype: torch.dtype
    abi: int
    ste_input: Optional[Tensor] = None
    overlap: bool = False
    zero_point: Optional[Tensor] = None


class LinearAddArguments(NamedTuple):
    """Of ``intscale::w4a8_linear_add``."""

    xq: Tensor
    token_scale: Tensor
    qdata: Tensor
    scale: Tensor
    row_scale: Tensor
    bias: Optional[Tensor]
    residual: Tensor
    out_features: int
    group_size: int
    scale_bits: int
    packing: str
    dtype: torch.dtype
    abi: int
    overlap: bool = False
    zero_point: Optional[Tensor] = None


class GatedArguments(NamedTuple):
    """Of ``intscale::w4a8_gated_linear``."""

    xq: Tensor
    token_scale: Tensor
    qdata: Tensor
    scale: Tensor
    row_scale: Tensor
    bias: Optional[Tensor]
    activation: str
    out_features: int
    group_size: int
    scale_bits: int
    packing: str
    dtype: torch.dtype
    abi: int
    overlap: bool = False
    zero_point: Optional[Tensor] = None


class GroupedArguments(NamedTuple):
    """Of ``intscale::w4a8_grouped_linear``."""

    xq: Tensor
    token_scale: Tensor
    qdata: Tensor
    scale: Tensor
    row_scale: Tensor
    bias: Optional[Tensor]
    offsets: Tensor
    out_features: int
    group_size: int
    scale_bits: int
    packing: str
    dtype: torch.dtype
    abi: int
    row_index: Optional[Tensor] = None
    out_index: Optional[Tensor] = None
    ste_input: Optional[Tensor] = None
    zero_point: Optional[Tensor] = None


class InputGradArguments(NamedTuple):
    """Of ``intscale::w4a8_grouped_input_grad``."""

    grad: Tensor
    qdata: Tensor
    scale: Tensor
    row_scale: Tensor
    offsets: Tensor
    rows: int
    out_features: int
    in_features: int
    group_size: int
    packing: str
    row_index: Optional[Tensor] = None
    out_index: Optional[Tensor] = None
    zero_point: Optional[Tensor] = None


class DequantizeTokenArguments(NamedTuple):
    """Of ``intscale::dequantize_per_token``."""

    xq: Tensor
    token_scale: Tensor
    dtype: torch.dtype


class DequantizeWeightArguments(NamedTuple):
    """Of ``intscale::dequantize_weight``."""

    qdata: Tensor
    scale: Tensor
    row_scale: Tensor
    out_features: int
    in_features: int
    group_size: int
    packing: str
    dtype: torch.dtype
    zero_point: Optional[Tensor] = None


OfLinear = Union[LinearArguments, LinearAddArguments, GatedArguments, GroupedArguments]
Arguments = TypeVar("Arguments", bound=tuple)


def schema(kind: type[tuple]) -> str:
    """``(Tensor xq, ..., Tensor? zero_point=None) -> Tensor``."""
    hints, defaults = get_type_hints(kind), kind._field_defaults  # type: ignore[attr-defined]
    fields = [f"{_TYPES[hints[n]]} {n}" + (f"={defaults[n]}" if n in defaults else "") for n in kind._fields]  # type: ignore[attr-defined]
    return f"({', '.join(fields)}) -> Tensor"


def takes(kind: type[Arguments]) -> Callable[[Callable[[Arguments], Tensor]], Callable[..., Tensor]]:
    """Decorator: an implementation of an op that takes the named tuple; a caller may leave out what has a default."""

    def decorate(function: Callable[[Arguments], Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            return function(kind(*args, **kwargs))

        return call

    return decorate


def arguments_of(kind: type[Arguments], node: fx.Node) -> Arguments:
    """The arguments of a node that calls the op of ``kind``."""
    return kind(*node.args, **node.kwargs)  # type: ignore[arg-type]


def converted(kind: type[Arguments], given: tuple, **others: Any) -> Arguments:
    """The arguments of another op: by name those of ``given`` that it has too, and ``others``."""
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return kind(**{name: getattr(given, name) for name in fields if hasattr(given, name)} | others)


def gradients(kind: type[tuple], **by_name: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    """What a backward returns: one gradient or None for each argument."""
    return tuple(map(by_name.get, kind._fields))  # type: ignore[attr-defined]


def operands(a: OfLinear) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Optional[Tensor]]:
    """The activation, the weight and the bias, as the launchers take them first."""
    return a.xq, a.token_scale, a.qdata, a.scale, a.row_scale, a.bias


def form(a: Union[OfLinear, AccumulateArguments]) -> tuple[int, int, int, str]:
    """How the weight is stored: output features, group size, bits of a scale, packing."""
    return a.out_features, a.group_size, a.scale_bits, a.packing


def stored(a: Union[OfLinear, AccumulateArguments]) -> tuple[Tensor, Tensor, int, int, str, Optional[Tensor]]:
    """The stored weight as ``unpack_weight`` takes it."""
    return a.qdata, a.scale, a.out_features, a.group_size, a.packing, a.zero_point
