"""Products of integers with their exact results."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from intscale_compile import format as fmt
from intscale_compile.config import GROUP_SIZES
from intscale_compile.kernels.w4a8_linear import ACCUMULATE_OP, LINEAR_OP
from intscale_compile.ops import KERNEL_ABI

# (group_size, scale_bits, weight_bits, scale dtype): every group size, both schedules, both scale dtypes, int8 weights.
LAYOUTS = [
    *((g, 4, 4, torch.uint8) for g in GROUP_SIZES),
    (32, 8, 4, torch.uint8),
    (128, 8, 4, torch.uint8),
    (128, 12, 4, torch.int16),
    (-1, 8, 4, torch.uint8),
    (-1, 1, 8, torch.uint8),
]


SHAPES = [(1, 5, 3), (3, 65, 200), (2, 64, 256), (17, 130, 515)]  # (M, N, K); 515 = 4 groups of 128 and 3


class Problem:
    """A weight and activations straight from integers, and their accumulator in int64: no code of the package but the
    packing.
    """

    def __init__(self, m, n, k, layout, packing="plain", extreme=False, seed=0):
        group_size, scale_bits, weight_bits, scale_dtype = layout
        generator = torch.Generator().manual_seed(seed)
        groups, padded = fmt.num_groups(k, group_size), fmt.padded_in_features(k, group_size)
        top, low = 2**scale_bits - 1, -128 if weight_bits == 8 else -8
        if extreme:
            self.codes = torch.full((n, k), low, dtype=torch.int8)
            self.codes[1::2] = -low - 1
            self.xq = torch.full((m, k), -127, dtype=torch.int8)
            self.xq[1::2] = 127
            integers = torch.full((n, groups), top)
        else:
            self.codes = torch.randint(low, -low, (n, k), dtype=torch.int8, generator=generator)
            self.xq = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
            integers = torch.randint(1, top + 1, (n, groups), generator=generator)
        per_weight = torch.stack([integers[:, (j // group_size if group_size != -1 else 0)] for j in range(k)], dim=1)
        self.integers = self.codes.long() * per_weight
        self.accumulator = self.xq.long() @ self.integers.t()
        assert self.accumulator.abs().max() < 2**31
        self.token_scale = torch.rand(m, 1, generator=generator) * 0.1 + 1e-3
        self.row_scale = torch.rand(n, 1, generator=generator) * 0.01 + 1e-4
        self.bias = torch.randn(n, generator=generator)
        padded_codes = F.pad(self.codes, (0, padded - k))
        qdata = padded_codes if weight_bits == 8 else fmt.pack_int4(padded_codes, group_size)
        scale = integers.to(scale_dtype)
        if packing == "tiled":
            qdata = fmt.tile_rows(
                qdata, fmt.code_block_columns(group_size, weight_bits), 0 if weight_bits == 8 else fmt.ZERO_BYTE
            )
            scale = fmt.tile_rows(scale, 1, 1)
        self.weight = (qdata, scale)
        self.where = (n, group_size, scale_bits, packing)

    def accumulate(self, xq=None):
        return ACCUMULATE_OP(self.xq if xq is None else xq, *self.weight, *self.where, KERNEL_ABI)

    def linear(self, dtype=torch.float32, bias=True, xq=None, token_scale=None, ste_input=None):
        return LINEAR_OP(
            self.xq if xq is None else xq,
            self.token_scale if token_scale is None else token_scale,
            *self.weight,
            self.row_scale,
            self.bias if bias else None,
            *self.where,
            dtype,
            KERNEL_ABI,
            ste_input,
        )
