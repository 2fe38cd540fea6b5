"""A model with two groups of siblings, its exact compilation, and the memory that tensors hold."""

from __future__ import annotations

import gc

import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.compile.binding import bind, rewrite_graph
from intscale_compile.compile.options import parse_options
from intscale_compile.kernels.cpu_gemm import _unpacked

QUICK = IntScaleConfig(scale_search="absmax")
NAMES = IntScaleTensor.tensor_data_names


class Attention(nn.Module):
    """Two groups of siblings, q/k/v and gate/up."""

    def __init__(self, width=128, config=QUICK, rows=(128, 64, 64)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, n, bias=False) for n in rows)
        self.gate, self.up = nn.Linear(width, 192, bias=False), nn.Linear(width, 192, bias=False)
        self.eval().requires_grad_(False)
        if config is not None:
            quantize_(self, config)

    def forward(self, x):
        z = x.sin()
        return torch.cat([self.q(x), self.k(x), self.v(x), self.gate(z), self.up(z)], -1)

    def keys(self, x):
        return torch.cat([self.k(x), self.v(x)], -1)


X = torch.randn(3, 128)


def backend_of(graphs):
    """A backend that runs the rewritten graph op by op, which is exact, and forgets how it came about, as Inductor does."""
    settings, _ = parse_options(None, {"intscale.config": QUICK})

    def backend(gm, example_inputs):
        graphs.append(len(example_inputs))
        rewrite = rewrite_graph(gm, example_inputs, settings)
        bound = bind(rewrite, lambda graph, _: graph.forward)
        rewrite.release()
        return bound

    return backend


def rewritten(function, graphs=None):
    """``function`` compiled with :func:`backend_of`; ``graphs`` counts."""
    return torch.compile(function, backend=backend_of([] if graphs is None else graphs), fullgraph=True)


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


def live_bytes():
    """Bytes of all distinct storages that any live tensor holds, without the int8 weights that a CPU keeps for speed."""
    _unpacked.clear()
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            inner = [getattr(thing, n) for n in NAMES] if isinstance(thing, IntScaleTensor) else [thing]
            for tensor in inner:
                if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu":
                    storages[memory_of(tensor)] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
