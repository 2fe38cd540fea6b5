"""Learning codes on a task: a quantized model's scales stay, its codes follow a loss."""

from .codes import LearningReport, Mixed
from .codes import learn_codes as learn_codes  # listed at the top of the package

__all__ = ["LearningReport", "Mixed"]
