"""The functions of :mod:`.scalar` inside of Inductor's kernels, C++ and Triton: one pointwise expression each.

As operators of a graph they would be inlined into every reader, twice wherever a value is used twice: exponentially many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import torch

# Slow to import: Inductor, and what imports it. So this module is imported when something compiles.
from torch._inductor.lowering import fallback_handler, make_pointwise, register_lowering
from torch._inductor.virtualized import ops

from .attention import ATTENTION_OP
from .scalar import KEPT, SCALARS

Operand = Union["Value", int]


class Value:
    """An int64 value of a kernel, with the operators that the functions use."""

    __slots__ = ("held",)

    def __init__(self, held: Any):
        self.held = held

    def __add__(self, other: Operand) -> Value:
        return Value(ops.add(self.held, _held(other)))

    def __sub__(self, other: Operand) -> Value:
        return Value(ops.sub(self.held, _held(other)))

    def __mul__(self, other: Operand) -> Value:
        return Value(ops.mul(self.held, _held(other)))

    def __and__(self, other: Operand) -> Value:
        return Value(ops.bitwise_and(self.held, _held(other)))

    def __lshift__(self, other: Operand) -> Value:
        return Value(ops.bitwise_left_shift(self.held, _held(other)))

    def __rshift__(self, other: Operand) -> Value:
        return Value(ops.bitwise_right_shift(self.held, _held(other)))

    def __ge__(self, other: Operand) -> Value:
        return Value(ops.ge(self.held, _held(other)))


def _held(operand: Operand) -> Any:
    return operand.held if isinstance(operand, Value) else ops.constant(operand, torch.int64)


class InKernels:
    """What :class:`.scalar.OnTensors` has, for values of a kernel."""

    @staticmethod
    def where(condition: Value, a: Value, b: Value) -> Value:
        """``a`` or ``b``."""
        return Value(ops.where(condition.held, a.held, b.held))

    @staticmethod
    def abs(a: Value) -> Value:
        """Magnitude."""
        return Value(ops.maximum(a.held, ops.sub(ops.constant(0, torch.int64), a.held)))

    @staticmethod
    def clamp(a: Value, low: int, high: int) -> Value:
        """``a`` between two numbers."""
        return Value(ops.minimum(ops.maximum(a.held, _held(low)), _held(high)))

    @staticmethod
    def div(a: Value, b: Value) -> Value:
        """The quotient of two numbers that are not negative, without its fraction."""
        return Value(ops.truncdiv(a.held, b.held))

    @staticmethod
    def one(like: Value) -> Value:
        """1."""
        return Value(ops.constant(1, torch.int64))


def _in_kernel(function: Callable) -> Callable:
    return lambda *held: function(InKernels, *(Value(h) for h in held)).held


def register_scalar_lowerings() -> None:
    """Teach Inductor every function."""
    for op, function in SCALARS.items():
        lowering = make_pointwise(_in_kernel(function), override_return_dtype=torch.int64)
        register_lowering(op, broadcast=True, type_promotion_kind=None)(_kept(lowering) if op in KEPT else lowering)
    register_lowering(ATTENTION_OP, type_promotion_kind=None)(fallback_handler(ATTENTION_OP))


def _kept(lowering: Callable) -> Callable:
    """The lowering, with its result in memory: inlined, one number per row would be computed again for each element."""

    def lower(*args: Any) -> Any:
        result = lowering(*args)
        result.realize()
        return result

    return lower
