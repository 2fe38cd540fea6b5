"""``intscale::quantized_all_to_all``: rows for other ranks, in low-bit messages: dispatch and combine of expert parallelism.

Each rank sends the rows of each other rank as one message (``message``), as in the reduce leg of an all-reduce; its own rows stay
as they are. Where the number of features is a multiple of the group size no group crosses rows; elsewhere a group may hold
elements of two neighbouring rows of the same message.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from .agreement import agree
from .message import WireFormat
from .ops import check, group_or_default, no_gradient, resolve
from .pieces import Piece
from .transport import codec_for

torch.library.define(
    "intscale::quantized_all_to_all",
    "(Tensor x, str wire, SymInt[] output_splits, SymInt[] input_splits, str group_name) -> Tensor",
)
ALL_TO_ALL_OP = torch.ops.intscale.quantized_all_to_all.default


def _piece(elements: int, wire: WireFormat) -> Piece:
    """All of a message of so many elements."""
    return Piece(elements, elements, 0, -(-elements // wire.group_size), wire.group_size)


def _check_splits(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], ranks: int) -> None:
    for name, splits in (("output_splits", output_splits), ("input_splits", input_splits)):
        if len(splits) != ranks:
            raise InputError(
                f"an all-to-all over {ranks} ranks got {name} for {len(splits)}: give a number for each rank."
            )
    if x.dim() == 0 or x.shape[0] != sum(input_splits):
        raise InputError(
            f"an all-to-all got a tensor of shape {list(x.shape)} and input_splits={list(input_splits)}: they add up to the rows."
        )


def encoded(x: Tensor, wire: WireFormat) -> Tensor:
    """The message of the 1-D ``x``, uint8; empty for none."""
    piece = _piece(x.numel(), wire)
    layout = wire.layout(piece.groups)
    message = x.new_empty((1, layout.nbytes if x.numel() else 0), dtype=torch.uint8)
    if x.numel():
        codec_for(x).encode(x, piece, layout, message, 1)
    return message.view(-1)


def decoded(message: Tensor, out: Tensor, wire: WireFormat) -> None:
    """A message into the 1-D ``out``, of as many elements as it was made of."""
    if out.numel():
        piece = _piece(out.numel(), wire)
        codec_for(out).decode(message.view(1, -1), piece, wire.layout(piece.groups), out)


@torch.library.impl("intscale::quantized_all_to_all", "CompositeExplicitAutograd")
def _all_to_all(
    x: Tensor, wire: str, output_splits: Sequence[int], input_splits: Sequence[int], group_name: str
) -> Tensor:
    parsed, group = check(x, wire), resolve(group_name)
    _check_splits(x, output_splits, input_splits, group.size())
    rank, features = group.rank(), x.shape[1:].numel()
    agree("all_to_all", x[:0], wire, group)  # how many rows there are may differ
    flat = x.detach().contiguous().view(-1)
    parts = list(flat.split([rows * features for rows in input_splits]))
    out = x.new_empty((sum(output_splits), *x.shape[1:]))
    places = list(out.view(-1).split([rows * features for rows in output_splits]))
    sent = [encoded(part if i != rank else part[:0], parsed) for i, part in enumerate(parts)]
    coming = [n if i != rank else 0 for i, n in enumerate(place.numel() for place in places)]
    sizes = [parsed.layout(-(-n // parsed.group_size)).nbytes if n else 0 for n in coming]
    received = x.new_empty(sum(sizes), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(sent), sizes, [one.numel() for one in sent], group=group)
    for i, (place, message) in enumerate(zip(places, received.split(sizes))):
        if i == rank:
            place.copy_(parts[rank])
        else:
            decoded(message.contiguous(), place, parsed)
    return out


@torch.library.register_fake("intscale::quantized_all_to_all")
def _fake(x: Tensor, wire: str, output_splits: Sequence[int], input_splits: Sequence[int], group_name: str) -> Tensor:
    check(x, wire)
    return x.new_empty((sum(output_splits), *x.shape[1:]))


torch.library.register_autograd("intscale::quantized_all_to_all", no_gradient)


def all_to_all(
    x: Tensor,
    wire: str,
    output_splits: Optional[Sequence[int]] = None,
    input_splits: Optional[Sequence[int]] = None,
    group: Optional[Union[dist.ProcessGroup, str]] = None,
) -> Tensor:
    """Rows of ``x`` to other ranks, and theirs to this one, each rank's in one quantized message.

    Args:
        x: fp32, bf16 or fp16, rows along dimension 0, in the order of the ranks that they go to.
        wire: name of a wire format, as ``"int8"``.
        output_splits: rows that come from each rank; None: as many from each.
        input_splits: rows that go to each rank; None: as many to each.
        group: process group or its name; the default group if None.

    Returns:
        a new tensor of the rows of all ranks in their order; this rank's own have their bits, the others those of a quantization.

    Raises:
        InputError: another dtype, or splits that do not fit. ConfigError: not a wire format. CommunicationError: no such group.
    """
    resolved = group_or_default(group)
    even = [x.shape[0] // resolved.size()] * resolved.size() if x.dim() else []
    return ALL_TO_ALL_OP(x, str(wire), list(output_splits or even), list(input_splits or even), resolved.group_name)


def simulate_all_to_all(
    inputs: Sequence[Tensor], wire: WireFormat, splits: Sequence[Sequence[int]], rank: int
) -> Tensor:
    """What ``rank`` receives, computed in one process; ``splits[i][j]``: rows that rank ``i`` sends to rank ``j``."""
    parts = []
    for sender, (x, rows) in enumerate(zip(inputs, splits)):
        begin = list(itertools.accumulate(rows, initial=0))[rank]
        part = x[begin : begin + rows[rank]].contiguous()
        if sender != rank:
            flat, out = part.view(-1), torch.empty_like(part).view(-1)
            decoded(encoded(flat, wire), out, wire)
            part = out.view(part.shape)
        parts.append(part)
    return torch.cat(parts)
