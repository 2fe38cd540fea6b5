"""``Settings``: what the passes need to know; ``compile.options`` makes them from the options of ``torch.compile``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from ..config import IntScaleConfig


@dataclass(frozen=True)
class Settings:
    """What the passes need to know.

    Attributes:
        config: how plain weights are quantized at compile time (option ``intscale.config``, or its fields one by one
            as ``intscale.group_size`` and so on).
        quantize_plain: whether weights that nobody quantized are quantized at compile time. The default does so unless
            the model went through ``quantize_`` or was loaded quantized: then what is still plain was left out on purpose.
        merge_siblings: whether linears that read the same activation become one GEMM.
        skip: regular expressions; a weight whose dotted name one of them fully matches is left alone.
        decode_attention: whether attention of one new token per sequence runs in our kernel. The default does so on a GPU.
        gated_activation: whether ``act(gate) * up`` is computed inside the GEMM of both projections, given enough tokens.
            The default does so on a GPU.
        residual_add: whether a residual is added inside the GEMM of the linear before it, given enough tokens. The default
            does so where the Gluon kernels run.
        causal_attention: whether a mask that hides just the future becomes SDPA's ``is_causal``. The default does so.
        disable_passes: names of passes that do not run.
        communication_min_bytes: from how many bytes on a collective is quantized, where ``config.communication`` asks for
            it. The default is the threshold of the link that joins the ranks (``communication.link_cost``).
    """

    config: IntScaleConfig = field(default_factory=IntScaleConfig)
    quantize_plain: Optional[bool] = None
    merge_siblings: bool = True
    skip: tuple[str, ...] = ()
    decode_attention: Optional[bool] = None
    gated_activation: Optional[bool] = None
    residual_add: Optional[bool] = None
    causal_attention: Optional[bool] = None
    disable_passes: tuple[str, ...] = ()
    communication_min_bytes: Optional[int] = None
