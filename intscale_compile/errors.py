"""Errors raised by intscale_compile: one class per kind of mistake, each message ends with the mend."""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "CommunicationError",
    "CompileError",
    "ConfigError",
    "InputError",
    "IntegerOnlyError",
    "IntScaleError",
    "OverflowProofError",
    "ShardingError",
    "UnsupportedOpError",
    "VersionError",
    "WeightError",
]


class IntScaleError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(IntScaleError, ValueError):
    """A configuration field or a compile option has a value that is not supported."""


class WeightError(IntScaleError, ValueError):
    """A weight cannot be quantized: non-finite, wrong dtype, wrong number of dimensions, on the meta device."""


class OverflowProofError(WeightError):
    """The int32 accumulator of a row could overflow and its codes may not be changed."""


class InputError(IntScaleError, ValueError):
    """An activation handed to an intscale op has the wrong shape, dtype or device."""


class CalibrationError(IntScaleError, ValueError):
    """Calibration cannot go on: no data, NaN or Inf in it, or a model whose blocks are not known."""


class CheckpointError(IntScaleError, ValueError):
    """Stored quantized data contradicts itself: truncated, out of range, or a header that does not fit the data."""


class CommunicationError(IntScaleError, RuntimeError):
    """A quantized collective cannot run: no such process group, or ranks that disagree about what they exchange."""


class ShardingError(IntScaleError, ValueError):
    """A weight cannot be divided among ranks as asked: a shard would cut a group, a rotation block or an attention head."""


class UnsupportedOpError(IntScaleError, NotImplementedError):
    """An operator on an ``IntScaleTensor`` has no exact meaning on packed data."""


class VersionError(IntScaleError, ImportError):
    """An installed package is too old or too new for this release of intscale_compile."""


class CompileError(IntScaleError, RuntimeError):
    """The backend was asked for something that it cannot do with this graph."""


class IntegerOnlyError(CompileError):
    """A graph that was to be integers only has nodes in floating point.

    Attributes:
        nodes: their names in the graph.
    """

    def __init__(self, message: str, nodes: tuple[str, ...] = ()):
        super().__init__(message)
        self.nodes = nodes
