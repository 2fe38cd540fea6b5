"""Which layers of a plain checkpoint are quantized, by the names that vLLM gives them: the rule of ``tensors.selection``."""

from __future__ import annotations

from typing import Optional

from ...reasons import OUTPUT_NAMES, SMALLEST_FEATURES

ROUTERS = ("gate", "router", "shared_expert_gate")


def left_alone(
    prefix: str, out_features: Optional[int] = None, in_features: Optional[int] = None, ignore: tuple[str, ...] = ()
) -> bool:
    """Whether a layer stays plain: routers, output embeddings, layers of fewer than 16 features, and what is to be ignored.

    Args:
        prefix: dotted name of the layer in vLLM.
        out_features, in_features: of the whole layer.
        ignore: dotted names, or whole parts of them.
    """
    parts = prefix.split(".")
    if parts[-1] in ROUTERS or any(prefix == name or prefix.endswith(f".{name}") for name in OUTPUT_NAMES):
        return True
    if any(0 < size < SMALLEST_FEATURES for size in (out_features or 0, in_features or 0)):
        return True
    return any(f".{name}." in f".{prefix}." for name in ignore)
