"""How much each linear layer of a model suffers from quantization, and which of them deserve 8 bits.

For each weight alone: the signal-to-noise ratio of its layer's output, and what the loss over some text becomes when
nothing else is quantized. ``auto_overrides`` spends a memory budget on the weights that cost the most loss per byte.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import IntScaleConfig
from ..errors import CalibrationError
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import left_alone_by_default
from .layers import LinearWeight, blocks, weights_of, without_cache
from .sensitivity_svg import draw

log = logging.getLogger("intscale_compile")

WIDE = IntScaleConfig(weight_bits=8)


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one weight alone does.

    Attributes:
        name: of the weight's owner in the model; for a stack of experts with the parameter's name.
        snr_db: signal-to-noise ratio of the output of the module that owns the weight.
        divergence: mean Kullback-Leibler divergence of the next-token distribution from the original's, in nats.
        perplexity: of the whole model on the data.
        nbytes: of the quantized weight.
        wide_nbytes: of the same weight in 8 bits.
    """

    name: str
    snr_db: float
    divergence: float
    perplexity: float
    nbytes: int
    wide_nbytes: int


@dataclass(frozen=True)
class SensitivityReport:
    """The layers of a model in order of dataflow; ``str`` is a table, worst layer first, ``to_svg`` a picture."""

    layers: tuple[LayerSensitivity, ...]
    perplexity: float
    config: IntScaleConfig

    def worst_first(self) -> list[LayerSensitivity]:
        """Layers by falling divergence."""
        return sorted(self.layers, key=lambda layer: -layer.divergence)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':{width}}  {'SNR dB':>7} {'KL mnat':>8} {'perplexity':>10} {'change':>8} {'KiB':>8}"]
        for layer in self.worst_first():
            change = layer.perplexity / self.perplexity - 1
            lines.append(
                f"{layer.name:{width}}  {layer.snr_db:7.2f} {1e3 * layer.divergence:8.3f} {layer.perplexity:10.3f} "
                f"{change:+8.2%} {layer.nbytes / 1024:8.1f}"
            )
        lines.append(f"{'nothing quantized':{width}}  {'':7} {'':8} {self.perplexity:10.3f}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "perplexity": self.perplexity,
            "config": dataclasses.asdict(self.config),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }

    def to_svg(self) -> str:
        """Divergence of each layer as a bar, in order of dataflow."""
        bars = [(layer.name, layer.divergence, f"{layer.snr_db:.1f} dB") for layer in self.layers]
        return draw("KL divergence with only this layer quantized, in nats", bars)


def measure_sensitivity(
    model: nn.Module, data: Tensor, config: Optional[IntScaleConfig] = None, names: Optional[Sequence[str]] = None
) -> SensitivityReport:
    """Quantize each weight alone and measure; the model is left as it was.

    The original's distributions over all of ``data`` are kept: 4 bytes for each token and vocabulary entry.

    Args:
        model: a causal language model in floating point.
        data: token ids ``[sequences, tokens]``; a few thousand tokens rank layers well.
        config: how weights are quantized; activations of that layer become int8 per token as well.
        names: layers to measure, as in ``LayerSensitivity.name``; None: all that ``quantize_`` would take.

    Raises:
        CalibrationError: a name is unknown.
    """
    config = IntScaleConfig() if config is None else config
    weights = quantizable(model)
    chosen = list(weights) if names is None else list(names)
    unknown = [name for name in chosen if name not in weights]
    if unknown:
        raise CalibrationError(f"no linear layer is named {unknown[0]!r}: names are like {next(iter(weights))!r}.")
    with torch.no_grad(), without_cache(model):
        reference = [_log_probabilities(model, ids) for ids in data.split(1)]
        plain = _perplexity(reference, data)
        layers = []
        for name in chosen:
            layers.append(_measure(model, name, weights[name], config, data, reference))
            log.info("%s (%d of %d): divergence %.3g nats", name, len(layers), len(chosen), layers[-1].divergence)
    return SensitivityReport(tuple(layers), plain, config)


def auto_overrides(
    model: nn.Module,
    data: Tensor,
    memory_budget: float = 1.1,
    config: Optional[IntScaleConfig] = None,
    report: Optional[SensitivityReport] = None,
) -> dict[str, IntScaleConfig]:
    """Choose the layers that become W8A8: those with the largest divergence per additional byte that fit the budget.

    Args:
        model: a causal language model in floating point.
        data: token ids ``[sequences, tokens]``.
        memory_budget: bytes of the quantized weights relative to all of them in ``config``; 1.1 allows a tenth more.
        config: of the other layers.
        report: from ``measure_sensitivity``, measured already.

    Returns:
        ``{layer name: IntScaleConfig(weight_bits=8)}``, the worst layer first.

    Raises:
        CalibrationError: the budget is below 1, or the report belongs to 8-bit weights.
    """
    if not memory_budget >= 1:
        raise CalibrationError(
            f"memory_budget={memory_budget} is below 1: even with no layer in 8 bits it is exceeded."
        )
    report = measure_sensitivity(model, data, config) if report is None else report
    if report.config.weight_bits == 8:
        raise CalibrationError("every layer has 8 bits already: measure with IntScaleConfig(weight_bits=4).")
    room = (memory_budget - 1) * sum(layer.nbytes for layer in report.layers)
    ranked = sorted(report.layers, key=lambda layer: -layer.divergence / (layer.wide_nbytes - layer.nbytes))
    overrides = {}
    for layer in ranked:
        extra = layer.wide_nbytes - layer.nbytes
        if extra <= room and layer.divergence > 0:
            overrides[layer.name] = dataclasses.replace(WIDE)
            room -= extra
    return overrides


def quantizable(model: nn.Module) -> dict[str, LinearWeight]:
    """The weights of a model's blocks that are quantized by default, by name in the model."""
    left_alone = left_alone_by_default(model)
    return {
        f"{block_name}.{name}": weight
        for block_name, block in blocks(model)
        for name, weight in weights_of(block).items()
        if not weight.router and id(weight.module) not in left_alone
    }


@contextmanager
def replaced_weight(weight: LinearWeight, value: Tensor) -> Iterator[None]:
    """A parameter exchanged for a while; ``value`` is ``[..., N, K]``."""
    original = getattr(weight.module, weight.parameter)
    stored = value.transpose(-2, -1) if weight.transposed else value
    setattr(weight.module, weight.parameter, nn.Parameter(stored, requires_grad=False))
    try:
        yield
    finally:
        setattr(weight.module, weight.parameter, original)


def _measure(
    model: nn.Module, name: str, weight: LinearWeight, config: IntScaleConfig, data: Tensor, reference: list[Tensor]
) -> LayerSensitivity:
    dense = weight.weight
    quantized = IntScaleTensor.from_hp(dense, config, name=name)
    power = {"signal": 0.0, "noise": 0.0}

    def compare(module, args, kwargs, result) -> None:
        with replaced_weight(weight, dense):
            exact = module.forward(*args, **kwargs)
        power["signal"] += float(exact.double().square().sum())
        power["noise"] += float((result.double() - exact.double()).square().sum())

    with replaced_weight(weight, quantized):
        handle = weight.module.register_forward_hook(compare, with_kwargs=True)
        try:
            found = [_log_probabilities(model, ids) for ids in data.split(1)]
        finally:
            handle.remove()
    divergence = sum(float(F.kl_div(f, r, log_target=True, reduction="sum")) for f, r in zip(found, reference))
    snr = 10 * math.log10(power["signal"] / power["noise"]) if power["noise"] > 0 else float("inf")
    return LayerSensitivity(
        name, snr, divergence / data.numel(), _perplexity(found, data), quantized.nbytes_packed(), _wide_bytes(dense)
    )


def _wide_bytes(weight: Tensor) -> int:
    """Bytes of a weight in 8 bits: codes, one group scale and one row scale for each row."""
    rows = weight.numel() // weight.shape[-1]
    return weight.numel() + 5 * rows


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits[0].float().log_softmax(-1)


def _perplexity(log_probabilities: Sequence[Tensor], data: Tensor) -> float:
    losses = [float(F.nll_loss(p[:-1], ids[1:])) for p, ids in zip(log_probabilities, data)]
    return math.exp(sum(losses) / len(losses))
