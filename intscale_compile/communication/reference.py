"""The quantizer and the messages of a quantized collective in plain PyTorch: any device, the oracle for the kernels.

Per group, over its valid elements, all in fp32 (asymmetric, arXiv 2412.04964):

    minimum = min rounded down to bf16            scale = (max - minimum) / largest rounded up to bf16, at least 2**-100
    code = clamp(rint((x - minimum) * (1 / scale)), 0, largest)                 x^ = minimum + code * scale

``largest`` is the largest code, 2**bits - 1 or, of 8 bits, 254.

The product ``code * scale`` has at most 16 significant bits, so x^ has the same bits with and without fused multiply-add. A
group with NaN or Inf, or whose range overflows, has NaN for its scale and its minimum. With spike reserving (arXiv 2508.03760)
the first smallest and the first largest element of a group keep their values in bf16, and the range is that of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .message import MessageLayout, WireFormat, largest_code
from .pieces import Piece

SMALLEST_SCALE = 2.0**-100  # keeps 1 / scale finite
_UPPER = -65536  # the bits of a fp32 that a bf16 keeps


def round_down(x: Tensor) -> Tensor:
    """The largest bf16 not above each finite fp32, as fp32; -0.0 becomes 0.0."""
    bits = x.view(torch.int32)
    down = (bits & _UPPER) + torch.where((bits < 0) & ((bits & 0xFFFF) != 0), 65536, 0).to(torch.int32)
    return torch.where(x == 0, 0, down).to(torch.int32).view(torch.float32)


def round_up(x: Tensor) -> Tensor:
    """The smallest bf16 not below each positive fp32, as fp32."""
    return ((x.view(torch.int32) + 0xFFFF) & _UPPER).view(torch.float32)


def _ends(values: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group among the elements that are ``taken``; NaN if one of them is; 0 if none is."""
    low = torch.where(taken, values, float("inf")).amin(-1, keepdim=True)
    high = torch.where(taken, values, -float("inf")).amax(-1, keepdim=True)
    some = taken.any(-1, keepdim=True)
    return torch.where(some, low, 0.0), torch.where(some, high, 0.0)


def _to_bf16(x: Tensor, bad: Tensor) -> Tensor:
    """bf16 of fp32, ties to even; the NaN 0x7FC0 where ``bad``: conversions differ in the NaN that they give."""
    return torch.where(bad, 0x7FC0, x.to(torch.bfloat16).view(torch.int16)).to(torch.int16).view(torch.bfloat16)


def quantize_groups(
    values: Tensor, valid: Tensor, bits: int, spikes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize groups.

    Args:
        values: fp32 ``[G, g]``.
        valid: bool ``[G, g]``; the other elements take no part, and their codes are 0.
        bits: 4, 5, 6 or 8.
        spikes: whether the smallest and the largest element keep their values.

    Returns:
        codes int32 ``[G, g]``, scales and minimums bf16 ``[G]``, spike values bf16 ``[G, 2]`` and positions uint8 ``[G, 2]``.
    """
    low, high = _ends(values, valid)
    bad = ~(high - low < float("inf"))
    spike, taken = torch.cat([low, high], -1), valid
    position = torch.stack([(valid & (values == end)).int().argmax(-1) for end in (low, high)], -1)
    if spikes:
        place = torch.arange(values.shape[-1], device=values.device)
        taken = valid & (place != position[:, :1]) & (place != position[:, 1:])
        low, high = _ends(values, taken)
    minimum = round_down(low)
    extent = high - minimum
    bad |= ~(extent < float("inf"))
    # A tensor: CUDA multiplies by the reciprocal of a divisor that is a number.
    levels = torch.full_like(extent, largest_code(bits))
    scale = round_up(extent / levels).clamp(min=SMALLEST_SCALE)
    codes = torch.round((values - minimum) * (1.0 / scale)).clamp(0, largest_code(bits))
    codes = torch.where(taken & ~bad, codes, 0).to(torch.int32)
    position = torch.where(bad, 0, position).to(torch.uint8)
    spike = torch.where(spike == 0, 0.0, spike)  # no -0.0
    scale, minimum, spike = (_to_bf16(part, bad) for part in (scale, minimum, spike))
    return codes, scale.squeeze(-1), minimum.squeeze(-1), spike, position


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int32 codes ``[G, g]`` to the bytes of a message, uint8 ``[G * g * bits / 8]``."""
    if bits == 8:
        return codes.to(torch.uint8).flatten()
    low, high = (codes & 15).chunk(2, -1)
    packed = (low | (high << 4)).to(torch.uint8).flatten()
    if bits == 4:
        return packed
    if bits == 5:
        plane = ((codes >> 4).view(codes.shape[0], 8, -1) << _shifts(1, codes.device).view(8, 1)).sum(1)
    else:
        pairs = (codes >> 4).view(codes.shape[0], 2, -1, 2)
        plane = (pairs << _shifts(2, codes.device).view(2, 1, 2)).sum((1, 3))
    return torch.cat([packed, plane.to(torch.uint8).flatten()])


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where the elements of a byte of a plane of high bits begin."""
    return torch.arange(0, 8, bits, dtype=torch.int32, device=device)


def unpack_codes(packed: Tensor, layout: MessageLayout) -> Tensor:
    """The inverse of :func:`pack_codes`: int32 ``[G, g]``."""
    groups = layout.groups
    if layout.bits == 8:
        return packed.view(groups, -1).to(torch.int32)
    low = packed[: layout.high_plane].view(groups, -1).to(torch.int32)
    codes = torch.cat([low & 15, low >> 4], -1)
    if layout.bits == 4:
        return codes
    plane = packed[layout.high_plane :].view(groups, -1).to(torch.int32)
    if layout.bits == 5:
        high = (plane[:, None] >> _shifts(1, packed.device).view(8, 1)) & 1
    else:
        high = (plane[:, None, :, None] >> _shifts(2, packed.device).view(2, 1, 2)) & 3
    return codes | (high << 4).view(groups, -1)


def encode_message(x: Tensor, layout: MessageLayout, out: Tensor) -> None:
    """Write the message of ``x``, 1-D of at most ``groups * group_size`` elements, into ``out``, uint8 ``[nbytes]``."""
    size = layout.groups * layout.group_size
    values = F.pad(x.to(torch.float32), (0, size - x.numel())).view(layout.groups, layout.group_size)
    valid = (torch.arange(size, device=x.device) < x.numel()).view_as(values)
    codes, scale, minimum, spike, position = quantize_groups(values, valid, layout.bits, layout.spikes)
    parts = [pack_codes(codes, layout.bits), scale, minimum, *((spike, position) if layout.spikes else ())]
    message = torch.cat([part.flatten().view(torch.uint8) for part in parts])
    out[: message.numel()] = message
    out[message.numel() :] = 0


def decode_message(message: Tensor, layout: MessageLayout) -> Tensor:
    """fp32 ``[groups * group_size]`` of a message; elements that its sender did not have are of no meaning."""
    groups = layout.groups
    scale = message[layout.scales : layout.minimums].view(torch.bfloat16).float().unsqueeze(-1)
    minimum = message[layout.minimums : layout.spike_values].view(torch.bfloat16).float().unsqueeze(-1)
    values = minimum + unpack_codes(message[: layout.code_bytes], layout).float() * scale
    if layout.spikes:
        spike = message[layout.spike_values : layout.spike_positions].view(torch.bfloat16).float().view(groups, 2)
        position = message[layout.spike_positions :][: 2 * groups].view(groups, 2).long()
        for k in range(2):
            values.scatter_(1, position[:, k : k + 1], spike[:, k : k + 1])
    return values.flatten()


def encode(x: Tensor, piece: Piece, layout: MessageLayout, messages: Tensor, skip: int) -> None:
    """Messages uint8 ``[rows, nbytes]`` of the parts of ``x`` that the owners 0, 1, ... but ``skip`` have of a piece."""
    for row, message in enumerate(messages):
        start, stop = piece.bounds(row + (row >= skip))
        encode_message(x[start:stop], layout, message)


def reduce(
    x: Tensor,
    received: Tensor,
    piece: Piece,
    rank: int,
    layout: MessageLayout,
    out: Tensor,
    out_layout: Optional[MessageLayout],
) -> None:
    """Sum the own part of ``x`` and ``received``, uint8 ``[ranks - 1, nbytes]``, in rank order, the own part not quantized.

    Into ``out``: a message uint8 ``[nbytes]`` of ``out_layout``, or, where that is None, elements of the whole slice.
    """
    start, stop = piece.bounds(rank)
    total = torch.zeros(stop - start, dtype=torch.float32, device=x.device)
    for other in range(received.shape[0] + 1):
        row = other - (other > rank)
        total += x[start:stop].float() if other == rank else decode_message(received[row], layout)[: stop - start]
    if out_layout is None:
        out[piece.begin : piece.begin + stop - start] = total
    else:
        encode_message(total, out_layout, out)


def decode(received: Tensor, piece: Piece, layout: MessageLayout, out: Tensor) -> None:
    """Messages uint8 ``[ranks, nbytes]`` to the elements of a piece in the 1-D ``out``."""
    for row, message in enumerate(received):
        start, stop = piece.bounds(row)
        out[start:stop] = decode_message(message, layout)[: stop - start]


def simulate_reduce_scatter(
    inputs: Sequence[Tensor], wire: WireFormat, length: int, out_dtype: torch.dtype
) -> list[Tensor]:
    """Sum of slice ``r`` of the 1-D inputs of all ranks as rank ``r`` computes it, for every ``r``, in one process."""
    ranks = len(inputs)
    piece = Piece(inputs[0].numel(), length, 0, -(-length // wire.group_size), wire.group_size)
    layout = wire.layout(piece.groups)
    sent = [x.new_empty((ranks - 1, layout.nbytes), dtype=torch.uint8) for x in inputs]
    for rank, (x, messages) in enumerate(zip(inputs, sent)):
        encode(x, piece, layout, messages, rank)
    sums = []
    for rank, x in enumerate(inputs):
        received = torch.stack([sent[other][rank - (rank > other)] for other in range(ranks) if other != rank])
        start, stop = piece.bounds(rank)
        sums.append(x.new_empty(stop - start, dtype=out_dtype))
        reduce(x, received, piece, rank, layout, sums[-1], None)
    return sums


def simulate_all_gather(
    inputs: Sequence[Tensor], wire: WireFormat, length: int, elements: int, dtype: torch.dtype
) -> Tensor:
    """What every rank receives when rank ``r`` sends ``inputs[r]``, slice ``r`` of ``elements`` elements."""
    piece = Piece(elements, length, 0, -(-length // wire.group_size), wire.group_size)
    layout = wire.layout(piece.groups)
    messages = inputs[0].new_empty((len(inputs), layout.nbytes), dtype=torch.uint8)
    for x, message in zip(inputs, messages):
        encode_message(x, layout, message)
    out = inputs[0].new_empty(elements, dtype=dtype)
    decode(messages, piece, layout, out)
    return out


def simulate_all_reduce(inputs: Sequence[Tensor], wire: WireFormat) -> Tensor:
    """The result of ``all_reduce`` on every rank, computed in one process from the inputs of all ranks."""
    elements, dtype = inputs[0].numel(), inputs[0].dtype
    length = wire.slice_elements(elements, len(inputs))
    sums = simulate_reduce_scatter([x.reshape(-1) for x in inputs], wire, length, torch.float32)
    return simulate_all_gather(sums, wire, length, elements, dtype).view(inputs[0].shape)


def simulate_lossless_all_reduce(inputs: Sequence[Tensor]) -> Tensor:
    """The result of a lossless all-reduce on every rank: fp32 sum from 0.0 on in rank order, rounded once to the dtype."""
    total = torch.zeros_like(inputs[0], dtype=torch.float32)
    for x in inputs:
        total += x.float()
    return total.to(inputs[0].dtype)
