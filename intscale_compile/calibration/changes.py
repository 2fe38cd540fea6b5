"""What a model must be before a calibration, and what that changes besides codes: parameters, bytes, layers of other widths."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from ..errors import CalibrationError
from ..tensors.intscale_tensor import IntScaleTensor
from .config import CalibrationConfig
from .solve import FloatScaleWeight

log = logging.getLogger("intscale_compile")


def check_model(model: nn.Module) -> None:
    """Raise ``CalibrationError`` unless ``model`` is a module in eval mode without quantized weights."""
    if not isinstance(model, nn.Module):
        raise CalibrationError(f"model is a {type(model).__name__}: pass a transformers model.")
    if model.training:
        raise CalibrationError("the model is in training mode, where dropout may be active: call model.eval() first.")
    quantized = [n for n, p in model.named_parameters() if isinstance(p, (IntScaleTensor, FloatScaleWeight))]
    if quantized:
        raise CalibrationError(f"{quantized[0]} is quantized already: calibrate the original model.")


class Size(NamedTuple):
    """Of all parameters of a model, shared ones once: how many entries, how many bytes, and whether embeddings are tied."""

    parameters: int
    nbytes: int
    tied: bool


def size_of(model: nn.Module) -> Size:
    """How large a model is now."""
    parameters = list(model.parameters())
    nbytes = sum(p.nbytes_packed() if isinstance(p, IntScaleTensor) else p.nbytes for p in parameters)
    return Size(sum(p.numel() for p in parameters), nbytes, _is_tied(model))


def announce(model: nn.Module, config: CalibrationConfig) -> Size:
    """Log what a calibration will change, before it does; the size before."""
    if config.rotation in ("hadamard", "auto") and _is_tied(model):
        weight: Any = model.get_output_embeddings().weight  # type: ignore[operator]
        log.info(
            "the rotation gives the output embedding a weight of its own: %.1f million parameters, %.0f MB more "
            "(rotation='none' keeps it tied)",
            *(weight.numel() / 1e6, weight.nbytes / 1e6),
        )
    for pattern, other in config.overrides.items():
        log.info("weights that match %r are quantized in %d bits", pattern, other.weight_bits)
    return size_of(model)


def changes_of(model: nn.Module, before: Size) -> list[str]:
    """What has changed since: one sentence each."""
    after = size_of(model)
    found = [f"parameters take {after.nbytes / 1e6:.1f} MB instead of {before.nbytes / 1e6:.1f} MB"]
    if before.tied and not after.tied:
        more = (after.parameters - before.parameters) / 1e6
        found.append(
            f"the output embedding is no longer tied to the input embedding: {more:.1f} million parameters more"
        )
    weights = [p for p in model.parameters() if isinstance(p, IntScaleTensor)]
    bits = Counter(p.weight_bits for p in weights)
    if len(bits) > 1:
        found.append(", ".join(f"{count} weights in {width} bits" for width, count in sorted(bits.items())))
    if rotated := sum(bool(p.rotation) for p in weights):
        found.append(f"the inputs of {rotated} weights are rotated when the model runs")
    return found


def _is_tied(model: Any) -> bool:
    """Whether the output embedding is the input embedding's weight."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    head = model.get_output_embeddings()
    shared = getattr(head, "weight", None)
    return shared is not None and any(isinstance(m, nn.Embedding) and m.weight is shared for m in model.modules())
