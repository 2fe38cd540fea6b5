"""Collectives with quantized messages (Flash Communication, arXiv 2412.04964 and 2508.03760)."""

from .link_tuning import tune_link
from .message import WireFormat
from .ops import all_gather, all_reduce, reduce_scatter

__all__ = ["WireFormat", "all_gather", "all_reduce", "reduce_scatter", "tune_link"]
