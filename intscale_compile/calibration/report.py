"""``CalibrationReport``: what ``calibrate`` did, and in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from .config import CalibrationConfig
from .distilling import Distillation


@dataclass
class CalibrationReport:
    """What ``calibrate`` did.

    Attributes:
        config: the configuration.
        losses: squared error of each block's output relative to the original block's, those of earlier blocks included.
        weights: names of quantized parameters.
        changes: what else is different now: bytes, an output embedding of its own, 8-bit weights, rotated inputs.
        distillation: its losses.
        how_distilled: whether the whole model was distilled in the end, and why (not); "" where nothing was asked for.
    """

    config: CalibrationConfig
    losses: dict[str, float] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    distillation: Optional[Distillation] = None
    how_distilled: str = ""

    def __str__(self) -> str:
        rows = [f"  {name}: {loss:.3e}" for name, loss in self.losses.items()]
        head = f"{len(self.weights)} weights; relative error of each block:"
        last = [self.how_distilled] if self.how_distilled else []
        return "\n".join([str(self.config), *self.changes, *last, head, *rows])
