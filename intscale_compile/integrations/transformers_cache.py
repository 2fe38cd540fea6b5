"""A key and value cache of transformers that holds int8 codes and their scales. Imports transformers.

Used of transformers: ``Cache`` and ``DynamicLayer``, both public; checked with 5.17 to 5.24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..kernels.integer.cache_form import CACHE_DEQUANTIZE_OP, CACHE_QUANTIZE_OP

_TENSORS = ("keys", "key_scales", "values", "value_scales")


class IntegerLayer(DynamicLayer):
    """Keys and values of one layer: int8 ``[B, H, S, D]``, and dyadic scales int32 ``[B, H, S, 1]``."""

    keys: Any
    values: Any
    _layer_type = None  # not the layer that transformers makes by itself
    key_scales: Tensor
    value_scales: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty codes and scales for keys and values of these shapes."""
        self.device, self.dtype = key_states.device, key_states.dtype
        for states, codes, scales in ((key_states, *_TENSORS[:2]), (value_states, *_TENSORS[2:])):
            empty = (*states.shape[:2], 0)
            setattr(self, codes, states.new_empty((*empty, states.shape[-1]), dtype=torch.int8))
            setattr(self, scales, states.new_empty((*empty, 1), dtype=torch.int32))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, H, T, D]``; returns all of them, as attention takes them."""
        (keys, key_scales), (values, value_scales) = map(CACHE_QUANTIZE_OP, (key_states, value_states))
        if self.is_initialized:
            keys, key_scales = torch.cat([self.keys, keys], -2), torch.cat([self.key_scales, key_scales], -2)
            values, value_scales = (
                torch.cat([self.values, values], -2),
                torch.cat([self.value_scales, value_scales], -2),
            )
        self.keys, self.key_scales, self.values, self.value_scales = keys, key_scales, values, value_scales
        self.device, self.dtype, self.is_initialized = key_states.device, key_states.dtype, True
        dtype = key_states.dtype
        return CACHE_DEQUANTIZE_OP(keys, key_scales, dtype), CACHE_DEQUANTIZE_OP(values, value_scales, dtype)

    def _each(self, change: Any) -> None:
        if self.is_initialized:
            for name in _TENSORS:
                setattr(self, name, change(getattr(self, name)))

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def reset(self) -> None:
        """Drop all tokens."""
        self.is_initialized = False
        for name in _TENSORS:
            setattr(self, name, None)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens; a positive number is refused, as transformers does."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}.")
        if tokens_to_remove:
            self._each(lambda x: x[..., :tokens_to_remove, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences ``indices``."""
        self._each(lambda x: x[indices.to(x.device), ...])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences in another order, for beam search."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def offload(self) -> None:
        """To the CPU."""
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to where the keys came from."""
        self._each(lambda x: x.to(self.device, non_blocking=True))


class IntegerCache(Cache):
    """An int8 cache for ``generate`` and ``past_key_values``, which integer-only models write and read without a float.

    It grows with the text. In a float model it is a cache of 8 bits: keys and values are quantized per token and head.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=IntegerLayer)
