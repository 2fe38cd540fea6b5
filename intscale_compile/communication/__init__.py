"""Collectives with quantized messages (Flash Communication, arXiv 2412.04964 and 2508.03760)."""

from .choice import Allowed, Plan, plan
from .exchange import all_to_all
from .link_cost import Threshold, threshold
from .link_table import Key, Link
from .link_tuning import tune_link
from .message import WireFormat
from .ops import all_gather, reduce_scatter
from .planned import all_reduce
from .reference import simulate_all_reduce

__all__ = [
    "Allowed",
    "Key",
    "Link",
    "Plan",
    "Threshold",
    "WireFormat",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "plan",
    "reduce_scatter",
    "simulate_all_reduce",
    "threshold",
    "tune_link",
]
