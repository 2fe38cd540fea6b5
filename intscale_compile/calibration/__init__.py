"""Calibration: quantizing a model layer by layer with regard to what its layers see."""

from .config import PRESETS
from .pipeline import CalibrationReport
from .random_data import random_token_ids
from .sensitivity import LayerSensitivity, SensitivityReport, auto_overrides, measure_sensitivity

__all__ = [
    "PRESETS",
    "CalibrationReport",
    "LayerSensitivity",
    "SensitivityReport",
    "auto_overrides",
    "measure_sensitivity",
    "random_token_ids",
]
