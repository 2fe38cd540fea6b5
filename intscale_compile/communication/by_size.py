"""Collectives that decide when they run: below a number of bytes plain, from there on quantized.

The compiler emits them where the number of tokens is symbolic, so that one graph serves prefill and decoding. Every rank
sees the same shape, and the number is part of the graph, so all ranks decide alike. Sizes in bytes of the whole tensor: the
input of an all-reduce or a reduce-scatter, the output of an all-gather.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import ALL_GATHER_OP, ALL_REDUCE_OP, REDUCE_SCATTER_OP

PLAIN = torch.ops._c10d_functional

torch.library.define("intscale::all_reduce_by_size", "(Tensor x, str wire, int min_bytes, str group_name) -> Tensor")
torch.library.define(
    "intscale::reduce_scatter_by_size", "(Tensor x, str wire, int min_bytes, int ranks, str group_name) -> Tensor"
)
torch.library.define(
    "intscale::all_gather_by_size", "(Tensor x, str wire, int min_bytes, int ranks, str group_name) -> Tensor"
)
ALL_REDUCE_BY_SIZE = torch.ops.intscale.all_reduce_by_size.default
REDUCE_SCATTER_BY_SIZE = torch.ops.intscale.reduce_scatter_by_size.default
ALL_GATHER_BY_SIZE = torch.ops.intscale.all_gather_by_size.default


@torch.library.impl("intscale::all_reduce_by_size", "CompositeExplicitAutograd")
def _all_reduce(x: Tensor, wire: str, min_bytes: int, group_name: str) -> Tensor:
    if x.nbytes >= min_bytes:
        return ALL_REDUCE_OP(x, wire, group_name)
    return PLAIN.wait_tensor(PLAIN.all_reduce(x.contiguous(), "sum", group_name))


@torch.library.impl("intscale::reduce_scatter_by_size", "CompositeExplicitAutograd")
def _reduce_scatter(x: Tensor, wire: str, min_bytes: int, ranks: int, group_name: str) -> Tensor:
    if x.nbytes >= min_bytes:
        return REDUCE_SCATTER_OP(x, wire, ranks, group_name)
    return PLAIN.wait_tensor(PLAIN.reduce_scatter_tensor(x.contiguous(), "sum", ranks, group_name))


@torch.library.impl("intscale::all_gather_by_size", "CompositeExplicitAutograd")
def _all_gather(x: Tensor, wire: str, min_bytes: int, ranks: int, group_name: str) -> Tensor:
    if x.nbytes * ranks >= min_bytes:
        return ALL_GATHER_OP(x, wire, ranks, group_name)
    return PLAIN.wait_tensor(PLAIN.all_gather_into_tensor(x.contiguous(), ranks, group_name))


@torch.library.register_fake("intscale::all_reduce_by_size")
def _all_reduce_fake(x: Tensor, wire: str, min_bytes: int, group_name: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("intscale::reduce_scatter_by_size")
def _reduce_scatter_fake(x: Tensor, wire: str, min_bytes: int, ranks: int, group_name: str) -> Tensor:
    return x.new_empty((x.shape[0] // ranks, *x.shape[1:]))


@torch.library.register_fake("intscale::all_gather_by_size")
def _all_gather_fake(x: Tensor, wire: str, min_bytes: int, ranks: int, group_name: str) -> Tensor:
    return x.new_empty((x.shape[0] * ranks, *x.shape[1:]))
