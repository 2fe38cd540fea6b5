"""What we add to transformers: an implementation of its experts interface."""

from __future__ import annotations

from typing import Any

import torch

from ..tensors.expert_operators import register_fallback
from ..tensors.experts import IMPLEMENTATION, experts_forward
from .after_import import after_import

_MOE_MODULE = "transformers.integrations.moe"


def _register(moe: Any) -> None:
    moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    register_fallback(torch.ops.transformers.grouped_mm_fallback)


def register_experts_implementation() -> None:
    """Offer ``"intscale"`` to transformers: now where it is imported, else when it will be."""
    after_import(_MOE_MODULE, _register)
