"""Checkpoints of other tools: taken over without requantizing, and written so that other engines can serve them."""

from .export import export_compressed_tensors
from .model import import_quantized
from .report import ImportReport, LayerReport
from .torchao_tensors import import_tensors

__all__ = ["ImportReport", "LayerReport", "export_compressed_tensors", "import_quantized", "import_tensors"]
