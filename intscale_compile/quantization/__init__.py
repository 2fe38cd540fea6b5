"""``quantize``, and what torchao's ``quantize_`` does with an ``IntScaleConfig``; whether a model bears it."""

from .planning import quantize, quantize_output_embedding

__all__ = ["quantize", "quantize_output_embedding"]
