"""Calibration without data: random token ids, as FPTQ (arXiv 2308.15987) has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError


def random_token_ids(model: nn.Module, sequences: int = 128, tokens: int = 512, seed: int = 0) -> Tensor:
    """Token ids drawn evenly from a language model's vocabulary, for ``calibrate`` where there is no text at all.

    Text, of any kind, is better: the activations of random tokens are those of text only roughly (docs/accuracy.md has figures).

    Args:
        model: with input embeddings, as every language model of transformers has them.
        sequences: how many.
        tokens: length of each.
        seed: equal seeds give equal ids on every device.

    Returns:
        int64 ``[sequences, tokens]`` on the CPU.

    Raises:
        CalibrationError: the model has no vocabulary.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 2:
        raise CalibrationError(f"{type(model).__name__} has no vocabulary to draw from: pass data of its own kind.")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (sequences, tokens), generator=generator)
