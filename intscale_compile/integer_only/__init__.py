"""Integer-only models: the same logits, to the bit, on every device, in every batch, in prefill and in decoding.

    quantize_(model, IntScaleConfig())
    run = torch.compile(model, backend="intscale", options={"intscale.integer_only": True})
    logits = run(ids, use_cache=False).logits

What is promised, and how it is proved: docs/integer_only.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..compile.binding import bind, rewrite_graph
from ..compile.options import parse_options
from ..errors import ConfigError, InputError
from ..kernels.integer.arithmetic import FRACTION
from ..passes.integer.bounds import Bound
from .proof import OPTIONS, IntegerProof, prove
from .widths import paper_widths

if TYPE_CHECKING:
    from ..integrations.transformers_cache import IntegerCache

__all__ = ["Bound", "IntegerCache", "IntegerProof", "eager_backend", "hash_logits", "integers", "prove", "run_eagerly"]


def __getattr__(name: str) -> Any:
    if name != "IntegerCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imports transformers, which is optional.
    from ..integrations.transformers_cache import IntegerCache

    return IntegerCache


def run_eagerly(model: nn.Module | Callable, widths: str = "default", **options: Any) -> Callable:
    """The integer-only form of ``model``, run operator by operator without Inductor: the reference of the compiled one.

    Args:
        model: a quantized model.
        widths: ``"paper"``: probabilities and sigmoids have 8 bits, as in I-LLM's paper, to see what that costs; much slower.
        options: further ``intscale.`` options, without the prefix.

    Raises:
        ConfigError: other widths.
    """
    if widths not in ("default", "paper"):
        raise ConfigError(f'widths={widths!r}: use "default" or "paper".')
    run = torch.compile(model, backend=eager_backend(**options), fullgraph=True)
    if widths == "default":
        return run

    def narrow(*args: Any, **kwargs: Any) -> Any:
        with paper_widths():
            return run(*args, **kwargs)

    return narrow


def eager_backend(**options: Any) -> Callable:
    """A backend for ``torch.compile`` that does what :func:`run_eagerly` does."""
    given = {**OPTIONS, **{f"intscale.{name}": value for name, value in options.items()}}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        settings, _ = parse_options(None, given)
        return bind(rewrite_graph(gm, example_inputs, settings), lambda graph, _: graph.forward)

    return backend


def integers(logits: Tensor) -> Tensor:
    """The integers behind logits of an integer-only model, int64 with 16 fraction bits; exact for float32 below 256.

    Raises:
        InputError: the logits are not floating point.
    """
    if not logits.dtype.is_floating_point:
        raise InputError(f"the logits are {logits.dtype}; the model returns floating point ones.")
    return (logits.to(torch.float64) * 2.0**FRACTION).round().to(torch.int64)


def hash_logits(logits: Tensor) -> str:
    """SHA-256 of the integers behind logits, in order, as little-endian int64: equal on all devices."""
    data = integers(logits).contiguous().cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(data).hexdigest()
