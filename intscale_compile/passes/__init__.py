"""The compiler's passes, in the order in which they run. One file, one pass, one thing.

| pass | matches | emits |
|---|---|---|
| local_shards | products with weights that DTensor has divided among ranks | the same products with each rank's shard |
| match | products of an activation with a constant weight | nothing: lists candidates and reasons |
| insert_qdq | candidates that can be quantized | quantize and dequantize nodes around a linear |
| experts | grouped and batched products with a stack of expert weights | ``intscale.w4a8_grouped_linear`` |
| share_quantize | quantizations of one activation | one of them |
| merge_siblings | Q/DQ linears that read one activation | one Q/DQ linear and a split |
| fuse | linears between dequantize nodes | ``intscale.w4a8_linear`` |
| rotate_quantize | a Hadamard transform and a quantization, on a GPU | ``intscale.hadamard_quantize`` |
| gated_activation | a gate and an up projection with ``act(gate) * up`` | ``intscale.w4a8_gated_linear`` |
| residual_add | a linear and the addition of a residual, on a GPU | ``intscale.w4a8_linear_add`` |
| causal_attention | attention whose mask hides just the future, or nothing | attention with a flag and shared heads |
| decode_attention | attention of one query token over repeated heads | ``intscale.decode_attention`` |
| cache_counters | the counters of a static cache, one for each layer | one addition to all of them |
| quantize_collectives | sums and gathers of activations over ranks, after AOTAutograd | ``intscale.quantized_all_reduce`` ... |
"""

from .base import Candidate, GraphRewrite, Pass, apply_passes
from .experts import EXPERTS
from .fuse import FUSE
from .gated_activation import GATED_ACTIVATION
from .insert_qdq import INSERT_QDQ
from .integer import INTEGER_PASSES
from .local_shards import LOCAL_SHARDS
from .match import MATCH
from .merge_siblings import MERGE_SIBLINGS
from .model.cache_counters import CACHE_COUNTERS
from .model.causal_attention import CAUSAL_ATTENTION
from .model.decode_attention import DECODE_ATTENTION
from .residual_add import RESIDUAL_ADD
from .rotate_quantize import ROTATE_QUANTIZE
from .settings import Settings
from .share_quantize import SHARE_QUANTIZE

PASSES: tuple[Pass, ...] = (
    LOCAL_SHARDS, MATCH, INSERT_QDQ, EXPERTS, SHARE_QUANTIZE, MERGE_SIBLINGS, FUSE, ROTATE_QUANTIZE, GATED_ACTIVATION,
    RESIDUAL_ADD, CAUSAL_ATTENTION, DECODE_ATTENTION, CACHE_COUNTERS,
)  # fmt: skip

INTEGER_ONLY: tuple[Pass, ...] = (
    LOCAL_SHARDS, MATCH, INSERT_QDQ, SHARE_QUANTIZE, MERGE_SIBLINGS, FUSE, CAUSAL_ATTENTION, *INTEGER_PASSES,
)  # fmt: skip

POST_GRAD_PASSES = (
    "quantize_collectives",
)  # run in Inductor, on the graph of ATen operators; a file imported when needed

__all__ = ["INTEGER_ONLY", "PASSES", "Candidate", "GraphRewrite", "Pass", "Settings", "apply_passes"]
