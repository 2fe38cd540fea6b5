"""The compiler's passes, in the order in which they run. One file, one pass, one thing.

| pass | matches | emits |
|---|---|---|
| match | products of an activation with a constant weight | nothing: lists candidates and reasons |
| insert_qdq | candidates that can be quantized | quantize and dequantize nodes around a linear |
| share_quantize | quantizations of one activation | one of them |
| merge_siblings | Q/DQ linears that read one activation | one Q/DQ linear and a split |
| fuse | linears between dequantize nodes | ``intscale.w4a8_linear`` |
"""

from .base import Candidate, GraphRewrite, Pass, apply_passes
from .fuse import FUSE
from .insert_qdq import INSERT_QDQ
from .match import MATCH
from .merge_siblings import MERGE_SIBLINGS
from .share_quantize import SHARE_QUANTIZE

PASSES: tuple[Pass, ...] = (MATCH, INSERT_QDQ, SHARE_QUANTIZE, MERGE_SIBLINGS, FUSE)

__all__ = ["PASSES", "Candidate", "GraphRewrite", "Pass", "apply_passes"]
