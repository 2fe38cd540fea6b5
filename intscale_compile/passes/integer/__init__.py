"""Passes of integer-only models, run behind ``fuse`` in the place of the fusions of the float form.

| pass | matches | emits |
|---|---|---|
| integer_casts | conversions between floating point types, idle dropout | nothing |
| integer_ends | embedding, output embedding, results | ``int_embedding``, a W8A8 linear, ``int_to_float`` |
| integer_positions | rotary position embedding | ``int_rope`` |
| integer_attention | attention with a mask of type bool or a flag, int8 caches | ``int_quantize``, ``int_attention`` |
| integer_ranks | layers whose input features are divided among ranks | ``int_quantize_to``, ``int_epilogue``, sums over ranks |
| integer_norms | RMSNorm, LayerNorm, a quantization behind | ``int_norm``, ``int_norm_quantize`` |
| integer_gates | SiLU, GELU, gated or not, a quantization behind | ``int_gate_quantize``, ``int_activation(_quantize)`` |
| integer_linears | quantizations, ``w4a8_linear`` | ``int_quantize``, ``int_linear`` |
| integer_residuals | sums | ``int_add`` |
| integer_types | every node | nothing: refuses a graph with a floating point node |
"""

from .attention import INTEGER_ATTENTION
from .casts import INTEGER_CASTS
from .ends import INTEGER_ENDS
from .gates import INTEGER_GATES
from .linears import INTEGER_LINEARS
from .norms import INTEGER_NORMS
from .positions import INTEGER_POSITIONS
from .ranks import INTEGER_RANKS
from .residuals import INTEGER_RESIDUALS
from .types import INTEGER_TYPES

INTEGER_PASSES = (
    INTEGER_CASTS, INTEGER_ENDS, INTEGER_POSITIONS, INTEGER_ATTENTION, INTEGER_RANKS, INTEGER_NORMS, INTEGER_GATES,
    INTEGER_LINEARS, INTEGER_RESIDUALS, INTEGER_TYPES,
)  # fmt: skip

__all__ = ["INTEGER_PASSES"]
