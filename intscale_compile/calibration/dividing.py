"""The data of one call in parts: what statistics look at, what is behind it, and the batches of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from .capture import Data, batches_of


def tokens_of(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch count, padding left out; 0 where it has neither token ids nor embeddings."""
    found = next((batch[name] for name in ("input_ids", "inputs_embeds") if isinstance(batch.get(name), Tensor)), None)
    if found is None:
        return 0
    mask = batch.get("attention_mask")
    masked = isinstance(mask, Tensor) and mask.shape == found.shape[:2]
    return int(mask.bool().sum()) if masked else found.shape[:2].numel()  # type: ignore[union-attr]


def divided(data: Data, tokens: int) -> tuple[Data, Data]:
    """The first sequences of a tensor, or entries of a list, that hold ``tokens`` tokens, and those behind them.

    Args:
        data: as for ``calibrate``.
        tokens: at least so many in the first part; 0, or more than there are: all.

    Raises:
        CalibrationError: there is no data, or it is of another kind.
    """
    batches = batches_of(data)
    if isinstance(data, Tensor):
        rows = -(-tokens // data.shape[1]) if tokens else len(data)
        return data[:rows], data[rows:]
    items = [data] if isinstance(data, Mapping) else list(data)
    end = len(items)
    if tokens:
        counts = accumulate(map(tokens_of, batches))
        end = next((place for place, count in enumerate(counts, 1) if count >= tokens), end)
    return items[:end], items[end:]


def grouped(batches: Sequence[Mapping[str, Any]], tokens: int) -> list[list[Mapping[str, Any]]]:
    """Neighbouring batches together until they hold ``tokens`` tokens; the last group may hold fewer."""
    groups: list[list[Mapping[str, Any]]] = []
    count = tokens
    for batch in batches:
        if count >= tokens:
            groups.append([])
            count = 0
        groups[-1].append(batch)
        count += tokens_of(batch)
    return groups
