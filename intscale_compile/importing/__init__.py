"""Checkpoints of other tools: taken over without requantizing, and written so that other engines can serve them."""

from .report import ConvertedLayer, ImportReport

__all__ = ["ConvertedLayer", "ImportReport"]
