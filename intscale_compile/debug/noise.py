"""How much a model's own rounding moves its output: the floor below which a difference between two runs says nothing.

With int8 activations a change of the last bits moves some values over a rounding boundary, and later layers see steps of
1/127 instead of 1e-7. Models that differ in nothing but the order of floating-point operations (eager and compiled, a batch
and its rows) are that far apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

KINDS = (nn.Embedding, nn.Conv1d, nn.Conv2d)  # what token ids and pixels meet first


@contextlib.contextmanager
def jittered(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """What enters the model changed in its last bits: outputs of embeddings and patch convolutions, or else its inputs.

    Each value is multiplied by ``1 + eps * z``: ``eps`` of its dtype (1.2e-7 in fp32), ``z`` standard normal.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator).to(value.device)
        return (value * (1 + torch.finfo(value.dtype).eps * noise)).to(value.dtype)

    first = [module for module in model.modules() if isinstance(module, KINDS)]
    if first:
        handles = [module.register_forward_hook(lambda _, args, result: tree_map(change, result)) for module in first]
    else:
        handles = [
            model.register_forward_pre_hook(lambda _, args, kwargs: tree_map(change, (args, kwargs)), with_kwargs=True)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
