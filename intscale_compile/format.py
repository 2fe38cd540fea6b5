"""The stored format, version 1: nibble packing, padding, tiles, and the proof that the int32 accumulator cannot overflow.

    W[n, k] = row_scale[n] * group_scale[n, k // group_size] * (q[n, k] - zero_point[n, k // group_size])

``q`` lies in [-8, 7], ``group_scale`` is a positive integer, ``zero_point`` in [-8, 7] and 0 where it is not stored.
Zero points that are stored as int16 are *offsets*, in units of the row scale instead of the codes, for groups whose minimum is no
multiple of their scale (GGUF's Q4_1 and Q4_K):

    W[n, k] = row_scale[n] * (group_scale[n, k // group_size] * q[n, k] - offset[n, k // group_size])

Everything here is a pure function of tensors. ``N`` is the number of output features, ``K`` of input features,
``Kp`` is ``K`` rounded up to :func:`padded_in_features`, ``G`` the number of groups (``Kp / group_size``, or 1 per channel).

Packed codes, ``qdata``: uint8 ``[..., N, Kp / 2]``, offset binary (``u = q + 8``). Rows are cut into blocks of
``P = pack_block(group_size)`` codes; byte ``j`` of a block holds ``k = j`` in its low nibble and ``k = j + P / 2`` in its
high one, so a kernel gets two contiguous halves from one load. ``P`` is 128, and 64 for groups of 32 and 64: each half
then lies within one group, whatever the group size, and is never shallower than the 32 that int8 tensor cores need.
With 8-bit weights ``qdata`` is int8 ``[..., N, Kp]``, not packed.

Padding codes are 0; padding groups have scale 1 and zero point 0. A padding code in a group with another zero point
counts for nothing: kernels must not read an activation there.

The tiled packing holds the same bytes as ``[N / 64][Kp / P][64 rows][P / 2 bytes]`` (``N`` padded to 64 with codes 0),
and the group scales and zero points as ``[N / 64][G][64 rows]``; all of them keep the weight's number of dimensions.

Every stored part is contiguous, with the strides of a new tensor (:func:`contiguous`).
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

VERSION = 1  # stored with every model; it grows when older releases would read a file wrongly
TILE_N = 64
INT32_MAX = 2**31 - 1
ACTIVATION_MAX = 127
CODE_MIN, CODE_MAX = -8, 7
OFFSET_BITS = 4  # of the group scales beside offsets, at least
ZERO_BYTE = 0x88  # two codes of 0 in offset binary


def pack_block(group_size: int) -> int:
    """Codes per packing block ``P`` for a group size (32, 64, 128, 256 or -1)."""
    return 64 if group_size in (32, 64) else 128


def k_alignment(group_size: int) -> int:
    """Multiple of input features to which rows are padded and at which they may be sliced."""
    return max(group_size, pack_block(group_size))


def padded_in_features(in_features: int, group_size: int) -> int:
    """``K`` rounded up to a whole number of groups and packing blocks."""
    align = k_alignment(group_size)
    return -(-in_features // align) * align


def num_groups(in_features: int, group_size: int) -> int:
    """Number of group scales stored per row, padding groups included."""
    return 1 if group_size == -1 else padded_in_features(in_features, group_size) // group_size


def padded_out_features(out_features: int) -> int:
    """``N`` rounded up to whole tiles of 64 rows."""
    return -(-out_features // TILE_N) * TILE_N


def pack_int4(codes: Tensor, group_size: int) -> Tensor:
    """Pack int8 codes in [-8, 7], ``[..., N, Kp]``, into uint8 ``[..., N, Kp / 2]``."""
    half = pack_block(group_size) // 2
    blocks = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, half))
    return (blocks[..., 0, :] | (blocks[..., 1, :] << 4)).flatten(-2)


def unpack_int4(qdata: Tensor, group_size: int) -> Tensor:
    """Inverse of :func:`pack_int4`: uint8 ``[..., N, Kp / 2]`` to int8 codes ``[..., N, Kp]``."""
    half = pack_block(group_size) // 2
    blocks = qdata.unflatten(-1, (-1, half))
    return torch.stack([(blocks & 15).to(torch.int8) - 8, (blocks >> 4).to(torch.int8) - 8], dim=-2).flatten(-3)


def pad_codes(codes: Tensor, in_features: int, group_size: int) -> Tensor:
    """Pad int8 codes ``[..., K]`` with zeros to ``[..., Kp]``."""
    return torch.nn.functional.pad(codes, (0, padded_in_features(in_features, group_size) - in_features))


def tile_rows(qdata: Tensor, block_bytes: int, fill: int) -> Tensor:
    """Reorder ``[..., N, C]`` into ``[..., Np, C]`` whose memory is ``[Np/64][C/block_bytes][64][block_bytes]``.

    Serves both the codes (``block_bytes = P / 2``, or ``P`` for 8-bit weights) and the group scales (``block_bytes = 1``).
    ``N`` is padded to ``Np`` with ``fill``.
    """
    rows = padded_out_features(qdata.shape[-2])
    if rows != qdata.shape[-2]:
        qdata = torch.nn.functional.pad(qdata, (0, 0, 0, rows - qdata.shape[-2]), value=fill)
    blocks = qdata.unflatten(-1, (-1, block_bytes)).unflatten(-3, (-1, TILE_N))
    return blocks.transpose(-3, -2).contiguous().view(*qdata.shape)


def untile_rows(tiled: Tensor, out_features: int, block_bytes: int) -> Tensor:
    """Inverse of :func:`tile_rows`; drops the padding rows."""
    rows, columns = tiled.shape[-2:]
    blocks = tiled.reshape(*tiled.shape[:-2], rows // TILE_N, columns // block_bytes, TILE_N, block_bytes)
    return blocks.transpose(-3, -2).reshape(*tiled.shape[:-2], rows, columns)[..., :out_features, :].contiguous()


def code_block_columns(group_size: int, weight_bits: int) -> int:
    """Columns of ``qdata`` that form one tile column: bytes of a packing block."""
    return pack_block(group_size) if weight_bits == 8 else pack_block(group_size) // 2


def expand_group_scale(group_scale: Tensor, padded_k: int) -> Tensor:
    """Repeat group scales ``[..., N, G]`` along the input dimension to ``[..., N, Kp]``."""
    return group_scale.repeat_interleave(padded_k // max(1, group_scale.shape[-1]), dim=-1)


def centered_codes(codes: Tensor, zero_point: Tensor) -> Tensor:
    """``codes - zero_point``: int8 ``[..., N, Kp]`` and int8 ``[..., N, G]`` to int8 in [-15, 15]."""
    return codes - expand_group_scale(zero_point, codes.shape[-1])


def is_offset(zero_point: Optional[Tensor]) -> bool:
    """Whether zero points are offsets: int16, in units of the row scale."""
    return zero_point is not None and zero_point.dtype == torch.int16


def exact_weight(codes: Tensor, group_scale: Tensor, zero_point: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """The weight ``[..., N, Kp]`` in units of the row scale: integers below ``2**24``, which fp32 holds exactly.

    Args:
        codes: int8 ``[..., N, Kp]``, less their zero points where those are no offsets.
        group_scale: integer ``[..., N, G]``.
        zero_point: offsets are subtracted; others are not looked at.
        dtype: of the result, fp32 or fp64.
    """
    width = codes.shape[-1]
    exact = codes.to(dtype) * expand_group_scale(group_scale, width).to(dtype)
    if zero_point is None or not is_offset(zero_point):
        return exact
    return exact - expand_group_scale(zero_point, width).to(dtype)


def schedule_bits(scale_bits: int, asymmetric: bool) -> int:
    """The bits of group scales by which a kernel chooses its schedule: up to 4 they are multiplied into the int8 weight.

    With zero points a code is up to 15 away from 0. Times 7 that fits int8, times 15 it does not: 4-bit scales count as 5.
    Weights with offsets have scales of at least 4 bits (:data:`OFFSET_BITS`), so that they never fold.
    """
    return 5 if asymmetric and scale_bits == 4 else scale_bits


def rotation_fits(size: object, in_features: int) -> bool:
    """Whether ``size`` is a block Hadamard size for ``in_features``: 0, or a power of two above 1 that divides them."""
    if not isinstance(size, int) or isinstance(size, bool):
        return False
    return size == 0 or (size > 1 and size & (size - 1) == 0 and in_features % size == 0)


def is_permutation(order: Tensor, size: int) -> bool:
    """Whether ``order``, of any shape, holds each integer from 0 to ``size - 1`` once."""
    if order.is_floating_point() or order.dtype == torch.bool or order.numel() != size:
        return False
    return bool(torch.equal(order.reshape(-1).long().sort().values, torch.arange(size, device=order.device)))


def contiguous(part: Tensor) -> Tensor:
    """``part`` with the strides of a new tensor of its shape, so that all stored parts of one shape are laid out alike.

    ``Tensor.contiguous`` leaves the strides of dimensions of size 1 as they are: those of ``[1, N].t()`` stay ``(1, N)``,
    and compiled code that was made for ``(1, 1)`` refuses them.
    """
    wanted, step = [], 1
    for size in reversed(part.shape):
        wanted.append(step)
        step *= max(1, size)
    part = part.contiguous()
    return part if list(part.stride()) == wanted[::-1] else part.clone(memory_format=torch.contiguous_format)


def accumulator_bound(
    codes: Tensor, group_scale: Tensor, offset: Optional[Tensor] = None, in_features: Optional[int] = None
) -> Tensor:
    """Largest magnitude that the integer accumulator of each row can reach, over all int8 activations.

    ``127 * sum_g group_scale[n, g] * sum_{k in g} |q[n, k]|`` bounds every partial sum too, in any order of summation.

    Args:
        codes: int8 ``[..., N, Kp]``, less their zero points.
        group_scale: integer ``[..., N, G]``.
        offset: int16 ``[..., N, G]`` in units of the row scale. Sums of the two parts may then wrap around on their way, as
            int32 does on every device; what they come to is exact.
        in_features: ``K``, beside offsets: those of the padding count for nothing.

    Returns:
        int64 ``[..., N]``. The row is safe when it is below ``2**31``.
    """
    if offset is not None:
        parts = [expand_group_scale(part, codes.shape[-1]).to(torch.int32) for part in (group_scale, offset)]
        exact = (codes * parts[0] - parts[1])[..., :in_features]
        return ACTIVATION_MAX * exact.abs().sum(-1, dtype=torch.int64)
    magnitude = codes.to(torch.int16).abs().unflatten(-1, (group_scale.shape[-1], -1)).sum(-1, dtype=torch.int64)
    return ACTIVATION_MAX * (magnitude * group_scale.to(torch.int64)).sum(-1)
