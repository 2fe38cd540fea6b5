"""The two legs of a quantized collective over a process group: one all-to-all and one all-gather of uint8 messages.

A slice is sent in pieces, so that a piece travels while the next one is quantized (the chunks of Algorithm 1 of
arXiv 2412.04964). A piece is the same range of groups in the slice of EVERY rank: who sums an element, and hence every bit of
the result, does not depend on how many pieces there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .message import MessageLayout, WireFormat
from .pieces import Piece, pieces

# torch 2.13 renamed them.
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Bytes of the codes of one piece. On a CPU measured with two ranks of one core each, gloo over 1 Gbit/s: 128 KB and 1 MB are
# slower. A GPU sends one piece.
PIECE_BYTES = {"cpu": 1 << 18}


def codec_for(x: Tensor) -> Any:
    """The module whose ``encode``, ``reduce`` and ``decode`` serve the device of ``x``."""
    if x.device.type == "cpu":
        # Imports Triton, which only GPUs need.
        from . import cpu_codec

        return cpu_codec
    if x.is_cuda:
        # Imports Triton, which only GPUs need.
        from . import triton_kernels

        return triton_kernels
    return reference


def cut(x: Tensor, elements: int, length: int, wire: WireFormat) -> list[Piece]:
    """The pieces in which slices of ``length`` elements travel."""
    nbytes = PIECE_BYTES.get(x.device.type)
    groups = length // wire.group_size + 1 if nbytes is None else nbytes * 8 // wire.bits // wire.group_size
    return pieces(elements, length, wire.group_size, max(1, groups))


class Pending:
    """Messages uint8 ``[rows, nbytes]`` that are on their way; ``wait`` returns them."""

    def __init__(self, received: Tensor, work: Any):
        self._received, self._work = received, work

    def wait(self) -> Tensor:
        """The messages, for whatever is queued next on this device."""
        if self._work is not None:
            self._work.wait()
        return self._received


def scatter(x: Tensor, piece: Piece, layout: MessageLayout, group: dist.ProcessGroup, overlap: bool) -> Pending:
    """Quantize the others' parts of a piece and exchange them: a message from every other rank, in rank order."""
    rank, ranks = group.rank(), group.size()
    sent = x.new_empty((ranks - 1, layout.nbytes), dtype=torch.uint8)
    received = torch.empty_like(sent)
    codec_for(x).encode(x, piece, layout, sent, rank)
    splits = [layout.nbytes * (other != rank) for other in range(ranks)]
    work = dist.all_to_all_single(received.view(-1), sent.view(-1), splits, splits, group=group, async_op=overlap)
    return Pending(received, work)


def gather(message: Tensor, group: dist.ProcessGroup, overlap: bool) -> Pending:
    """The message of every rank, the own one too."""
    received = message.new_empty((group.size(), message.numel()))
    return Pending(received, all_gather_tensor(received.view(-1), message, group=group, async_op=overlap))


def all_reduce(x: Tensor, wire: WireFormat, group: dist.ProcessGroup) -> Tensor:
    """Sum of the 1-D ``x`` over the ranks, the same bits on each."""
    codec, out = codec_for(x), torch.empty_like(x)
    length = wire.slice_elements(x.numel(), group.size())
    cuts = cut(x, x.numel(), length, wire)
    overlap, scattered, gathered = len(cuts) > 1, {}, {}
    # While piece i is quantized, piece i - 1 is in the reduce leg, and piece i - 2 in the gather leg.
    for i in range(len(cuts) + 2):
        if i < len(cuts):
            scattered[i] = scatter(x, cuts[i], wire.layout(cuts[i].groups), group, overlap)
        if i - 1 in scattered:
            received, piece = scattered.pop(i - 1).wait(), cuts[i - 1]
            layout = wire.layout(piece.groups)
            message = x.new_empty(layout.nbytes, dtype=torch.uint8)
            codec.reduce(x, received, piece, group.rank(), wire.layout(piece.groups), message, layout)
            gathered[i - 1] = gather(message, group, overlap)
        if i - 2 in gathered:
            received, piece = gathered.pop(i - 2).wait(), cuts[i - 2]
            codec.decode(received, piece, wire.layout(piece.groups), out)
    return out


def reduce_scatter(x: Tensor, length: int, wire: WireFormat, group: dist.ProcessGroup) -> Tensor:
    """Sum of this rank's slice, of ``length`` elements, of the 1-D ``x``."""
    codec, out = codec_for(x), x.new_empty(length)
    cuts = cut(x, x.numel(), length, wire)
    scattered: dict[int, Pending] = {}
    for i in range(len(cuts) + 1):
        if i < len(cuts):
            scattered[i] = scatter(x, cuts[i], wire.layout(cuts[i].groups), group, len(cuts) > 1)
        if i - 1 in scattered:
            received, piece = scattered.pop(i - 1).wait(), cuts[i - 1]
            codec.reduce(x, received, piece, group.rank(), wire.layout(piece.groups), out, None)
    return out


def all_gather(x: Tensor, wire: WireFormat, group: dist.ProcessGroup) -> Tensor:
    """1-D ``[ranks * n]`` of the 1-D ``x`` of every rank."""
    codec, length = codec_for(x), x.numel()
    out = x.new_empty(group.size() * length)
    cuts = cut(x, length, length, wire)
    gathered: dict[int, Pending] = {}
    for i in range(len(cuts) + 1):
        if i < len(cuts):
            layout = wire.layout(cuts[i].groups)
            message = x.new_empty((1, layout.nbytes), dtype=torch.uint8)
            codec.encode(x, cuts[i], layout, message, 1)
            gathered[i] = gather(message.view(-1), group, len(cuts) > 1)
        if i - 1 in gathered:
            received, piece = gathered.pop(i - 1).wait(), cuts[i - 1]
            whole = Piece(out.numel(), length, piece.begin, piece.groups, piece.group_size)
            codec.decode(received, whole, wire.layout(piece.groups), out)
    return out
