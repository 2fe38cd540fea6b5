"""The key and value cache in 8 bits, with one static scale for each head, for ``generate`` of any float or quantized model.

    kv_cache.measure_cache(model, token_ids)
    model.generate(**inputs, past_key_values=kv_cache.int8_cache(model))

Newer releases of transformers call that argument ``cache``. The form is FPTQ's (arXiv 2308.15987): scales are measured once, on
calibration data, and kept in the model's configuration.
A cache with dynamic scales, for integer-only models, is :class:`intscale_compile.integer_only.IntegerCache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .calibration.capture import Data, batches_of
from .errors import CalibrationError, ConfigError

__all__ = ["CacheScales", "int8_cache", "measure_cache"]

CONFIG_ATTRIBUTE = "intscale_cache_scales"
SMALLEST = 1e-12  # a head that was never active keeps a usable scale


@dataclass(frozen=True)
class CacheScales:
    """Static scales of a cache.

    Attributes:
        keys: for each layer one scale per head.
        values: likewise.
    """

    keys: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Scales of keys and values of each layer, fp32 ``[H]``."""
        return [(torch.tensor(k), torch.tensor(v)) for k, v in zip(self.keys, self.values)]


def measure_cache(model: nn.Module, data: Data) -> CacheScales:
    """Find the scale of each head's keys and values: the largest magnitude in ``data`` over 127; kept in the model's config.

    Args:
        model: a decoder of transformers in eval mode, before or after it is quantized, not compiled.
        data: as for ``calibrate``; keys and values of tokens that an ``attention_mask [B, T]`` leaves out do not count.

    Returns:
        The scales, which ``save_pretrained`` saves with the configuration.

    Raises:
        CalibrationError: no data; a model without a cache, or with layers that keep something else than the keys and
            values of all tokens (sliding windows, linear attention); or values that are not finite.
    """
    # Imports transformers, which is optional.
    from .integrations.transformers_int8_cache import floats_of_cache

    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
        raise CalibrationError(f"{type(model).__name__} has no cache to measure: pass a decoder model of transformers.")
    largest: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in batches_of(data):
            moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}  # type: ignore[arg-type]
            layers = [_extent(kept, moved, place) for place, kept in enumerate(floats_of_cache(model, moved))]
            seen = zip(largest, layers) if largest else zip(layers, layers)
            largest = [(torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])) for a, b in seen]
    both = ([(part[which].clamp(min=SMALLEST) / 127).tolist() for part in largest] for which in (0, 1))
    keys, values = (tuple(tuple(heads) for heads in part) for part in both)
    setattr(config, CONFIG_ATTRIBUTE, {"keys": [list(k) for k in keys], "values": [list(v) for v in values]})
    return CacheScales(keys, values)


def _extent(kept: Optional[tuple[Tensor, Tensor]], batch: dict[str, Any], layer: int) -> tuple[Tensor, Tensor]:
    """Largest magnitudes of the keys and values of each head, ``[H]`` on the CPU, padding left out."""
    if kept is None or kept[0] is None:
        raise CalibrationError(
            f"layer {layer} keeps something else than the keys and values of all tokens: such models keep their float cache."
        )
    mask = batch.get("attention_mask")
    counted = None if mask is None or mask.dim() != 2 else mask.bool()[:, None, :, None]
    found = []
    for part in kept:
        size = part.float().abs()
        size = size if counted is None else torch.where(counted, size, 0.0)
        found.append(size.amax((0, 2, 3)).cpu())
        if not bool(torch.isfinite(found[-1]).all()):
            raise CalibrationError(f"keys or values of layer {layer} are not finite: look for NaN in the data.")
    return found[0], found[1]


def int8_cache(model: nn.Module, max_cache_len: Optional[int] = None) -> Any:
    """An empty cache of int8 codes for ``past_key_values`` of a model's ``forward`` or ``generate``.

    Args:
        model: which :func:`measure_cache` saw, or that was loaded from what was saved after it.
        max_cache_len: a static cache of this length, whose steps can be compiled once; None: it grows with the text.

    Raises:
        ConfigError: there are no scales in its configuration.
    """
    # Imports transformers, which is optional.
    from .integrations.transformers_int8_cache import CodedCache

    stored = getattr(getattr(model, "config", None), CONFIG_ATTRIBUTE, None)
    if stored is None:
        raise ConfigError(
            f"{type(model).__name__} has no scales for its cache: call kv_cache.measure_cache(model, token_ids) first."
        )
    return CodedCache(CacheScales(stored["keys"], stored["values"]).tensors(), max_cache_len)
