"""Adapters of peft on quantized weights: a start that makes up for what quantization lost, and merging.

peft's own functions work as on any model: ``get_peft_model``, training, ``save_pretrained``, ``merge_and_unload``.
"""

from .initializing import InitializationReport, initialize
from .merging import merge, register

__all__ = ["InitializationReport", "initialize", "merge"]

register()
