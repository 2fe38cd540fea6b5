"""``Settings``: what the passes need to know; ``compile.options`` makes them from the options of ``torch.compile``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from ..config import IntScaleConfig

FORCIBLE = ("gated_activation", "residual_add", "decode_attention")


@dataclass(frozen=True)
class Settings:
    """What the passes need to know.

    Attributes:
        config: how plain weights are quantized at compile time (option ``intscale.config``, or its fields one by one
            as ``intscale.group_size`` and so on).
        quantize_plain: whether weights that nobody quantized are quantized at compile time. The default does so unless
            the model went through ``quantize_`` or was loaded quantized: then what is still plain was left out on purpose.
        skip: regular expressions; a weight whose dotted name one of them fully matches is left alone.
        disable_passes: names of passes that do not run, forced or not.
        force_passes: names of passes in ``FORCIBLE`` that rewrite also where it would not pay: without a GPU, or where
            Inductor would not call the op.
        communication: wire format of collectives, such as ``"int8"`` or ``"int4-spikes"`` (``communication.WireFormat``);
            ``"auto"``: all-reduces take the fastest lossless form, with ``"auto+int8"`` also that wire format; None: they stay
            plain.
        communication_min_bytes: from how many bytes on a collective is quantized, where ``communication`` asks for it. The
            default is the threshold of the link that joins the ranks (``communication.link_cost``).
        whole_prompt: the caller promises that the graph is a whole prompt without padding, with nothing in the cache before
            it: masks of type bool hide just the future, and keys behind the prompt need not be read. Set by
            ``prepare_for_generation``, which looks.
        integer_only: everything between token ids and logits is integer arithmetic; a graph for which that is not possible
            is refused (:mod:`.integer`).
        positions: rows of the table of rotary position embeddings of an integer-only model.
    """

    config: IntScaleConfig = field(default_factory=IntScaleConfig)
    quantize_plain: Optional[bool] = None
    skip: tuple[str, ...] = ()
    disable_passes: tuple[str, ...] = ()
    force_passes: tuple[str, ...] = ()
    communication: Optional[str] = None
    communication_min_bytes: Optional[int] = None
    whole_prompt: bool = False
    integer_only: bool = False
    positions: int = 8192
