"""Calibration without data: text that the model writes (LLM-QAT, arXiv 2305.17888), or random token ids (FPTQ, 2308.15987)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError


def random_token_ids(model: nn.Module, sequences: int = 128, tokens: int = 512, seed: int = 0) -> Tensor:
    """Token ids drawn evenly from a language model's vocabulary, for ``calibrate`` where there is no text at all.

    The activations of random tokens are those of text only roughly: text of any kind is better, and so is what the model
    writes itself (:func:`generated_token_ids`; docs/accuracy.md has figures).

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
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_vocabulary(model), (sequences, tokens), generator=generator)


def generated_token_ids(
    model: nn.Module, sequences: int = 128, tokens: int = 512, seed: int = 0, *, batch_size: int = 32
) -> Tensor:
    """Text that a language model writes by itself, for ``calibrate`` where there is no other.

    Each sequence begins with a token drawn evenly from the vocabulary; the others are drawn from the model's own
    distribution, ends of text left out. What PyTorch draws elsewhere is not disturbed.

    Args:
        model: a causal language model of transformers that ``generate`` takes, not quantized.
        sequences: how many.
        tokens: length of each.
        seed: equal seeds give equal ids on one device.
        batch_size: how many are written at a time.

    Returns:
        int64 ``[sequences, tokens]`` on the CPU.

    Raises:
        CalibrationError: the model has no vocabulary, or cannot generate.
    """
    if not callable(getattr(model, "generate", None)):
        raise CalibrationError(
            f"{type(model).__name__} cannot write text (it has no generate): pass data of its own kind."
        )
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(_vocabulary(model), (sequences, 1), generator=generator)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        parts = [_continued(model, part.to(device), tokens).cpu() for part in first.split(batch_size)]
    return torch.cat(parts)


def _continued(model: Any, first: Tensor, tokens: int) -> Tensor:
    """Sequences of ``tokens`` ids that begin with ``first [B, 1]``."""
    more = tokens - first.shape[1]
    if more < 1:
        return first
    return model.generate(
        first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_new_tokens=more, max_new_tokens=more, pad_token_id=0,
    )  # fmt: skip


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 2:
        raise CalibrationError(f"{type(model).__name__} has no vocabulary to draw from: pass data of its own kind.")
    return vocabulary
