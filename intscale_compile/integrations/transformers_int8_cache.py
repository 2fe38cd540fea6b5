"""A key and value cache of transformers in 8 bits with one static scale for each head. Imports transformers.

Used of transformers: ``Cache``, ``DynamicCache``, ``DynamicLayer`` and ``StaticLayer``, all public; checked with 5.17 to 5.24.
The codes lie in the layers' own ``keys`` and ``values``, so that what transformers does with these (beam search, cropping,
offloading, CUDA graphs over a static cache) works on int8 as it does on floats.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from ..errors import InputError
from .transformers_layers import CACHE_NAMES


class _Coded:
    """Before a layer of transformers: what is stored is int8, what attention gets is floating point."""

    scales: tuple[Tensor, Tensor]  # of keys and of values, fp32 [1, H, 1, 1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, H, T, D]``; returns all that is stored, as attention takes it.

        Raises:
            InputError: there are other heads than those that were measured.
        """
        states, dtype = (key_states, value_states), key_states.dtype
        if any(x.shape[1] != scale.shape[1] for x, scale in zip(states, self.scales)):
            found, wanted = key_states.shape[1], self.scales[0].shape[1]
            raise InputError(
                f"a cache with scales of {wanted} heads got keys of {found}: measure the cache of this model, undivided."
            )
        if self.scales[0].device != key_states.device:
            self.scales = tuple(scale.to(key_states.device) for scale in self.scales)  # type: ignore[assignment]
        codes = [encode(x, scale) for x, scale in zip(states, self.scales)]
        stored = super().update(*codes, *args, **kwargs)  # type: ignore[misc]
        keys, values = (decode(x, scale, dtype) for x, scale in zip(stored, self.scales))
        return keys, values


class Int8Layer(_Coded, DynamicLayer):
    """Keys and values of one layer, which grow with the text: int8 ``[B, H, S, D]``."""

    _layer_type = None  # not the layer that transformers makes by itself

    def __init__(self, scales: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.scales = scales


class Int8StaticLayer(_Coded, StaticLayer):
    """Keys and values of one layer at addresses that stay: int8 ``[B, H, max_cache_len, D]``."""

    _layer_type = None

    def __init__(self, scales: tuple[Tensor, Tensor], max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.scales = scales


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """Codes int8 ``[B, H, T, D]`` of keys or values; what is beyond the scale's range saturates."""
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8)


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of codes."""
    return (codes.float() * scale).to(dtype)


class CodedCache(Cache):
    """A cache whose layers hold int8 codes: growing ones, or static ones of ``max_cache_len`` tokens.

    Args:
        scales: for each layer the scales of keys and of values, fp32 ``[H]``.
        max_cache_len: length of static layers; None: they grow.
    """

    def __init__(self, scales: Sequence[tuple[Tensor, Tensor]], max_cache_len: Optional[int] = None) -> None:
        layers: list[Any] = []
        for keys, values in scales:
            both = keys.float().view(1, -1, 1, 1), values.float().view(1, -1, 1, 1)
            layers.append(Int8Layer(both) if max_cache_len is None else Int8StaticLayer(both, max_cache_len))
        super().__init__(layers=layers)


def floats_of_cache(model: Any, batch: dict[str, Any]) -> list[Optional[tuple[Any, Any]]]:
    """Keys and values ``[B, H, T, D]`` of each layer after ``model`` ran on ``batch``; None: a layer of another kind."""
    cache = DynamicCache(config=model.config)
    names = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[-1])
    model(**batch, **{name: cache}, use_cache=True)
    return [(layer.keys, layer.values) if type(layer) is DynamicLayer else None for layer in cache.layers]
