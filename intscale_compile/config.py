"""``IntScaleConfig``: how a weight is quantized; for torchao's ``quantize_`` and ``FqnToConfig`` and for transformers."""

from __future__ import annotations

import logging
from dataclasses import InitVar, dataclass
from typing import Optional, Union

from torchao.core.config import AOBaseConfig

from .errors import ConfigError
from .reasons import log_once

GROUP_SIZES = (32, 64, 128, 256, -1)
WEIGHT_BITS = (4, 8)
SCALE_SEARCHES = ("mse", "absmax")
PACKING_FORMATS = ("auto", "plain", "tiled")
OUTPUT_EMBEDDINGS = (None, "w8a8")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def say_communication_moved() -> None:
    """Say once that a wire format was dropped: it belongs to a compilation, not to a weight."""
    log_once(
        logging.WARNING,
        "a configuration or a weight asks for quantized collectives (communication), as version 0.1.0 stored it: that is "
        'ignored; write torch.compile(model, backend="intscale", options={"intscale.communication": "int8"}).',
    )


@dataclass
class IntScaleConfig(AOBaseConfig):
    """Weights in 4 bits with integer group scales, activations in 8 bits per token.

    Args:
        group_size: weights along the input dimension that share one group scale: 32, 64, 128, 256, or -1 for one
            group per output row ("per channel", the scheme of OdysseyLLM, arXiv 2311.09550).
        weight_bits: 4, or 8 for sensitive layers. Eight bits are always per channel (W8A8): ``group_size`` must be -1
            or left at its default.
        scale_bits: bits of a group scale, 1 to 8. Up to 4 bits a scale can be multiplied into the int8 weight, which
            is the fastest schedule; wider scales are applied to the accumulator. Used with ``amplifier="row"``.
        amplifier: where the float part of the scale lives. ``"row"``: one float scale per output row, searched.
            An integer such as 1024, or ``"layer"``: the scheme of Integer Scale (arXiv 2405.14597), one amplifier per
            weight, group scales ``round(float_scale * amplifier)`` and codes left as plain rounding made them;
            ``"layer"`` picks the smallest power of two that keeps every group scale at least 1 (its Listing 1).
        scale_search: ``"mse"`` tries every integer scale and keeps the least squared error; ``"absmax"`` takes the
            scale from the largest magnitude of the group.
        packing_format: ``"plain"`` rows, ``"tiled"`` blocks that a GPU reads contiguously, or ``"auto"``: tiled on a
            GPU, plain elsewhere. Lossless both ways.
        version: version of the stored format.
        output_embedding: what happens to the output embedding (``lm_head``). None: it is left alone unless it is named;
            ``"w8a8"``: its weight is kept in 8 bits per channel. One that shares its weight with the input embedding gets a
            weight of its own then, one byte for each entry more, and the input embedding stays as it is.

    Raises:
        ConfigError: a field has a value that is not listed above, or two fields contradict each other.
    """

    group_size: int = 128
    weight_bits: int = 4
    scale_bits: int = 4
    amplifier: Union[str, int] = "row"
    scale_search: str = "mse"
    packing_format: str = "auto"
    version: int = 1
    output_embedding: Optional[str] = None
    communication: InitVar[Optional[str]] = None  # files of version 0.1.0 have it

    def __post_init__(self, communication: Optional[str] = None) -> None:
        if communication is not None:
            say_communication_moved()
        self._check("group_size", _is_int(self.group_size) and self.group_size in GROUP_SIZES, f"one of {GROUP_SIZES}")
        self._check(
            "weight_bits", _is_int(self.weight_bits) and self.weight_bits in WEIGHT_BITS, f"one of {WEIGHT_BITS}"
        )
        self._check("scale_bits", _is_int(self.scale_bits) and 1 <= self.scale_bits <= 8, "an integer from 1 to 8")
        amplifier_ok = (
            self.amplifier in ("row", "layer")
            if isinstance(self.amplifier, str)
            else (_is_int(self.amplifier) and 1 <= self.amplifier <= 1 << 20)
        )
        self._check("amplifier", amplifier_ok, '"row", "layer" or an integer from 1 to 1048576')
        self._check("scale_search", self.scale_search in SCALE_SEARCHES, f"one of {SCALE_SEARCHES}")
        self._check("packing_format", self.packing_format in PACKING_FORMATS, f"one of {PACKING_FORMATS}")
        self._check("version", self.version == 1, "1: this release knows no other format")
        choices = '"w8a8" or None'
        self._check("output_embedding", self.output_embedding in OUTPUT_EMBEDDINGS, choices)
        if self.weight_bits == 8:
            self._check("group_size", self.group_size in (128, -1), "-1 with weight_bits=8, which is per channel")
            self._check("amplifier", self.amplifier == "row", '"row" with weight_bits=8')

    def _check(self, field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"IntScaleConfig.{field}={getattr(self, field)!r} is not supported: use {allowed}.")

    @property
    def effective_group_size(self) -> int:
        """Group size that the stored tensor has: -1 when ``weight_bits`` is 8."""
        return -1 if self.weight_bits == 8 else self.group_size

    @property
    def of_output_embedding(self) -> Optional[IntScaleConfig]:
        """The configuration of the output embedding's weight; None where it is left alone."""
        if self.output_embedding is None:
            return None
        return IntScaleConfig(weight_bits=8, group_size=-1, packing_format=self.packing_format)
