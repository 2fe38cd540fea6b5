"""Learning codes on a task: a quantized model's scales stay, its codes follow a loss."""

from .codes import LearningReport, Mixed, learn_codes

__all__ = ["LearningReport", "Mixed", "learn_codes"]
