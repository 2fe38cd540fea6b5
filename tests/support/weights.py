"""Packed weights for kernel tests, and the integer reference that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from intscale_compile import format as fmt


@dataclass(frozen=True)
class Problem:
    """One weight and its activations, packed as the kernels want them, with the exact accumulator."""

    xq: Tensor  # int8 [M, K]
    token_scale: Tensor  # fp32 [M, 1]
    qdata: Tensor
    scale: Tensor
    row_scale: Tensor  # fp32 [N, 1]
    bias: Tensor  # fp32 [N]
    weight_args: tuple  # out_features, group_size, scale_bits, packing
    accumulator: Tensor  # int64 [M, N]
    zero_point: Optional[Tensor] = None

    def to(self, device: str) -> Problem:
        """The same problem on another device; the reference stays where it is."""
        moved = {n: getattr(self, n).to(device) for n in ("xq", "token_scale", "qdata", "scale", "row_scale", "bias")}
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return Problem(**moved, weight_args=self.weight_args, accumulator=self.accumulator, zero_point=zero_point)

    def linear(self, bias: bool = True) -> Tensor:
        """Float result ``[M, N]`` in fp32, on the CPU."""
        y = self.accumulator.float() * self.token_scale.cpu() * self.row_scale.cpu().view(-1)
        return y + self.bias.cpu() if bias else y


def make_problem(
    m: int, n: int, k: int, group_size: int, scale_bits: int = 4, packing: str = "plain", weight_bits: int = 4,
    values: str = "random", scale_dtype: torch.dtype = torch.uint8, seed: int = 0, asymmetric: bool = False,
    offsets: bool = False,
) -> Problem:  # fmt: skip
    """Build a problem of ``"random"`` values, or ``"extreme"`` ones: codes -8 or 7, activations +-127, top scales.

    With ``asymmetric`` the groups have zero points, those farthest from the codes where values are extreme; with ``offsets``
    int16 ones, in units of the row scale.

    The extreme sum is as large as the format can make it, which is below 2**31 for the sizes tests use.
    """
    generator = torch.Generator().manual_seed(seed)
    padded_k, groups = fmt.padded_in_features(k, group_size), fmt.num_groups(k, group_size)
    low, high = (-128, 128) if weight_bits == 8 else (-8, 8)
    top = 2**scale_bits - 1
    if values == "extreme":
        codes = torch.full((n, k), low, dtype=torch.int8)
        codes[1::2] = high - 1
        xq = torch.full((m, k), -127, dtype=torch.int8)
        xq[1::2] = 127
        scale = torch.full((n, groups), top)
    else:
        codes = torch.randint(low, high, (n, k), dtype=torch.int8, generator=generator)
        xq = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
        scale = torch.randint(1, top + 1, (n, groups), generator=generator)
    codes = torch.nn.functional.pad(codes, (0, padded_k - k))
    zero_point = None
    if asymmetric:
        zero_point = torch.randint(-8, 8, (n, groups), dtype=torch.int8, generator=generator)
        if values == "extreme":
            zero_point = torch.where(codes[:, :1] < 0, 7, -8).to(torch.int8).expand(n, groups).contiguous()
    zeros = 0 if zero_point is None else fmt.expand_group_scale(zero_point, padded_k).long()
    weight = (codes.long() - zeros) * fmt.expand_group_scale(scale, padded_k)
    if offsets:
        zero_point = torch.randint(-3000, 3000, (n, groups), dtype=torch.int16, generator=generator)
        if values == "extreme":
            zero_point = torch.where(codes[:, :1] < 0, 8 * top, -8 * top).to(torch.int16).expand(n, groups).contiguous()
        weight -= fmt.expand_group_scale(zero_point, padded_k)
    accumulator = xq.long() @ weight[:, :k].t()
    assert accumulator.abs().max() < 2**31, "the test asks for a sum that the format forbids"
    scale = scale.to(scale_dtype)
    qdata = codes if weight_bits == 8 else fmt.pack_int4(codes, group_size)
    if packing == "tiled":
        fill = 0 if weight_bits == 8 else fmt.ZERO_BYTE
        qdata = fmt.tile_rows(qdata, fmt.code_block_columns(group_size, weight_bits), fill)
        scale = fmt.tile_rows(scale, 1, 1)
        zero_point = None if zero_point is None else fmt.tile_rows(zero_point, 1, 0)
    return Problem(
        xq=xq,
        token_scale=torch.rand(m, 1, generator=generator) * 0.1 + 1e-3,
        qdata=qdata,
        scale=scale,
        row_scale=torch.rand(n, 1, generator=generator) * 0.01 + 1e-4,
        bias=torch.randn(n, generator=generator),
        weight_args=(n, group_size, scale_bits, packing),
        accumulator=accumulator,
        zero_point=zero_point,
    )
