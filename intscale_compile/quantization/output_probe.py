"""Whether a model bears being quantized without data: its outputs before and after, on a few arbitrary tokens.

The error of the weights says nothing about that: it is 18 to 19 dB in every layer of every model, robust or not. What the
errors of all layers make of the next-token distribution does, even on tokens that mean nothing:

=========================================== ====================== ==================================
Kullback-Leibler divergence, nats           on the probe's tokens  change of perplexity on real text
=========================================== ====================== ==================================
SmolLM2-135M, groups of 128                 1.2 to 1.6             +68 %
SmolLM2-135M, groups of 32                  0.85 to 1.3            +33 %
a trained model of 8 layers, groups of 128  0.32 to 0.44           +7.5 %
SmolLM2-135M, 8 bits per channel            0.06 to 0.10           +3 %
=========================================== ====================== ==================================
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reasons import log_once

log = logging.getLogger("intscale_compile")

RESULT = "_intscale_probe"  # attribute of a model that was quantized without data
TOKENS = 64
LIMIT = 0.5  # nats; above, weights of the model are hurt more than 4 bits without data allow


@dataclass(frozen=True)
class ProbeResult:
    """What quantizing changed on the probe's tokens.

    Attributes:
        divergence: mean Kullback-Leibler divergence of the next-token distribution from the original's, in nats.
        same_token: share of tokens whose most likely successor stayed the same.
    """

    divergence: float
    same_token: float

    @property
    def hurts(self) -> bool:
        """Whether the model should not be used like this; a divergence that is not a number counts."""
        return not self.divergence <= LIMIT

    def __str__(self) -> str:
        return (
            f"quantizing without data changed this model much: on {TOKENS} arbitrary tokens the next-token distribution moved by "
            f"{self.divergence:.2f} nats (a model that bears it stays below {LIMIT}), and {self.same_token:.0%} of the most "
            "likely tokens stayed the same. Mends: calibrate(model, token_ids, 'best') on the original model, or "
            "IntScaleConfig(group_size=32), or IntScaleConfig(weight_bits=8, group_size=-1) for all layers or for those that "
            "calibration.auto_overrides names; intscale eval OUT --text FILE --against MODEL measures it."
        )


class OutputProbe:
    """Log probabilities ``[T, V]`` of a language model's next tokens, before its weights change."""

    def __init__(self, model: nn.Module):
        self._before = _log_probabilities(model)

    def compare(self, model: nn.Module) -> None:
        """Note on the model what has changed since, and warn where that is much."""
        after = None if self._before is None else _log_probabilities(model)
        if self._before is None or after is None:
            return
        same = (after.argmax(-1) == self._before.argmax(-1)).float().mean()
        result = ProbeResult(float(F.kl_div(after, self._before, reduction="batchmean", log_target=True)), float(same))
        setattr(model, RESULT, result)
        if result.hurts:
            log_once(logging.WARNING, str(result))


def probe_result(model: nn.Module) -> Optional[ProbeResult]:
    """What the probe found when the model was quantized; None: there was none, or its weights were chosen with data."""
    return vars(model).get(RESULT)


def _log_probabilities(model: Any) -> Optional[Tensor]:
    """fp32 ``[T, V]``; None where a model cannot be run just so: no language model, weights elsewhere, in training."""
    if model.training or not _is_language_model(model) or _is_distributed():
        return None
    parameters = list(model.parameters())
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        return None
    vocabulary = model.get_input_embeddings().num_embeddings
    # Beyond its table of positions a GPU would fail for the rest of the process.
    tokens = min(TOKENS, longest_text(model.config) or TOKENS)
    ids = (torch.arange(1, tokens + 1) * 977 % vocabulary)[None].to(parameters[0].device)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # any model of any library: what it raises on these tokens must not end the call
        log.debug("the model cannot be run on a few tokens, so what quantizing changes is not looked at: %s", error)
        return None
    return logits[0].float().log_softmax(-1) if isinstance(logits, Tensor) and logits.dim() == 3 else None


def longest_text(config: Any) -> Optional[int]:
    """Tokens that a model takes by its configuration; None: any number (XLNet, which has no table of positions, says -1)."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _is_language_model(model: Any) -> bool:
    """A decoder of transformers with an output embedding."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", True) or not hasattr(model, "get_output_embeddings"):
        return False
    return isinstance(model.get_output_embeddings(), nn.Linear) and isinstance(
        model.get_input_embeddings(), nn.Embedding
    )


def _is_distributed() -> bool:
    """Whether other processes may hold parts of the model: they would have to run it too."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
