"""Calibration: quantizing a model layer by layer with regard to what its layers see."""

from .config import PRESETS
from .distilling import Distillation, distill
from .random_data import generated_token_ids, random_token_ids
from .report import CalibrationReport
from .sensitivity import LayerSensitivity, SensitivityReport, auto_overrides, measure_sensitivity

__all__ = [
    "PRESETS",
    "CalibrationReport",
    "Distillation",
    "LayerSensitivity",
    "SensitivityReport",
    "auto_overrides",
    "distill",
    "generated_token_ids",
    "measure_sensitivity",
    "random_token_ids",
]
