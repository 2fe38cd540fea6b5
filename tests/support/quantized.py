"""A model with every kind of layer that ``quantize_`` takes or leaves."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor

QUICK = IntScaleConfig(scale_search="absmax")


def quantized_names(model):
    return sorted(name for name, p in model.named_parameters() if isinstance(p, IntScaleTensor))


class Model(nn.Module):
    """Two blocks, an embedding, an output head and a layer too small to gain anything."""

    def __init__(self, tied=False, head="lm_head"):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64, bias=False)}) for _ in range(2)
        )
        self.tiny = nn.Linear(64, 8)
        self.add_module(head, nn.Linear(64, 40, bias=False))
        self.head = head
        if tied:
            getattr(self, head).weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](F.silu(block["up"](x)))
        return getattr(self, self.head)(x), self.tiny(x)


BLOCKS = sorted(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down"))
