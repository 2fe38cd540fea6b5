"""Output embeddings that no longer share the weight of the input embedding: what a model of transformers has to know of that."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..config import IntScaleConfig

log = logging.getLogger("intscale_compile")
UNTIED = "_intscale_untied"  # attribute of an output embedding: bytes of the weight that it got


def announce_untied(name: str, weight: Tensor, config: IntScaleConfig) -> None:
    """Log what an output embedding's own weight ``[N, K]`` will cost, before anything changes."""
    log.info(
        "%s is shared with the input embedding, which stays as it is: the output embedding gets a weight of its own, %.1f MB "
        "in %d bits",
        *(name, weight.numel() * config.weight_bits / 8 / 1e6, config.weight_bits),
    )


def note_untied(model: nn.Module, layers: Sequence[Any]) -> None:
    """Say in a model's configuration that it is untied, where ``layers`` have weights of their own now.

    Encoder-decoder models share their embeddings in other ways as well, and keep their configuration.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    own = [layer for layer in layers if id(layer.weight) not in shared]
    for layer in own:
        weight = layer.weight
        vars(layer)[UNTIED] = weight.nbytes_packed() if hasattr(weight, "nbytes_packed") else weight.nbytes
    if own:
        for config in configurations(model):
            if getattr(config, "tie_word_embeddings", False) and not getattr(config, "is_encoder_decoder", False):
                config.tie_word_embeddings = False
                if hasattr(model, "all_tied_weights_keys"):
                    model.all_tied_weights_keys = {}  # type: ignore[assignment]


def configurations(model: nn.Module) -> list[Any]:
    """The configurations of a model and of its parts, each once."""
    return list({id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values())


def untied_notes(model: nn.Module) -> set[str]:
    """A sentence for each output embedding that got a weight of its own."""
    return {
        f"{name}: the output embedding has a weight of its own, {vars(module)[UNTIED] / 1e6:.1f} MB more than one shared with "
        "the input embedding"
        for name, module in model.named_modules()
        if UNTIED in vars(module)
    }
