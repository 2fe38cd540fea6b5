"""Calibration: quantizing a model layer by layer with regard to what its layers see."""

from .pipeline import CalibrationReport, calibrate
from .recipes import PRESETS, Recipe, recipe

__all__ = ["PRESETS", "CalibrationReport", "Recipe", "calibrate", "recipe"]
