"""A small model, compiled with our backend or run as its rewritten graph."""

from __future__ import annotations

import torch
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.compile.binding import bind, rewrite_graph
from intscale_compile.compile.options import parse_options
from intscale_compile.tensors.linear import linear


class Block(nn.Module):
    """q/k/v with biases, a product with a residual, and a gated MLP without biases."""

    def __init__(self, width=64, bias=True):
        super().__init__()
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, 32, bias=bias)
        self.v = nn.Linear(width, 32, bias=bias)
        self.gate = nn.Linear(width, 96, bias=False)
        self.up = nn.Linear(width, 96, bias=False)
        self.down = nn.Linear(96, width, bias=False)

    def forward(self, x):
        attention = torch.cat([self.k(x) * self.v(x)] * 2, -1) + self.q(x)
        return x + self.down(torch.nn.functional.silu(self.gate(attention)) * self.up(attention))


def compiled(model, **kwargs):
    return torch.compile(model, backend="intscale", fullgraph=True, **kwargs)


def rewritten(model, fullgraph=True, **options):
    """The rewritten graph run op by op: what the passes made, without Inductor's compile time."""
    settings, _ = parse_options(None, options)

    def backend(gm, example_inputs):
        return bind(rewrite_graph(gm, example_inputs, settings), lambda graph, _: graph.forward)

    return torch.compile(model, backend=backend, fullgraph=fullgraph)


def w4a8(x, weight, bias=None, config=None):
    """What the fused product must give, op by op."""
    return linear(x, IntScaleTensor.from_hp(weight, config or IntScaleConfig()), bias)
