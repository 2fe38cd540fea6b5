"""What torch itself brings: cuBLAS in bf16, fp8 and int8, and tinygemm."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from .base import Peer, fp8_rows, int4_groups

GROUP_SIZE = 128
INNER_K_TILES = 8  # tinygemm's packing; torchao's default


class Bf16(Peer):
    """cuBLAS, 16-bit weights."""

    name, title = "bf16", "cuBLAS bf16"

    @override
    def prepare(self, weight: Tensor) -> None:
        self.tensors, self.reference = (weight,), weight[self.columns]

    @override
    def run(self, x, tensors):
        return x.bf16 @ tensors[0].t()


class Fp8(Peer):
    """cuBLASLt fp8 with one scale per token and per row of the weight."""

    name, title = "fp8", "fp8 rowwise, `torch._scaled_mm` with fast accumulation"
    activation = "fp8"
    tolerance = 0.05
    fast_accum = True

    @override
    def prepare(self, weight: Tensor) -> None:
        codes, scale = fp8_rows(weight)
        self.tensors, self.reference = (codes, scale), codes[self.columns].float() * scale[self.columns]

    @override
    def run(self, x, tensors):
        (xq, token_scale), (codes, scale) = x.fp8, tensors
        return torch._scaled_mm(
            xq,
            codes.t(),
            scale_a=token_scale,
            scale_b=scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=self.fast_accum,
        )


class Fp8Default(Fp8):
    """With the sums that ``torch._scaled_mm`` makes unless told otherwise: slower and more accurate."""

    name, title = "fp8_default", "fp8 rowwise, `torch._scaled_mm` as it is by default"
    fast_accum = False


class Int8Mm(Peer):
    """cuBLASLt int8 to int32; no scale is applied."""

    name, title = "int8_mm", "`torch._int_mm`, int32 output, scaling not included"
    activation = "int8"
    tolerance = 0.0
    min_tokens = 17

    @override
    def prepare(self, weight: Tensor) -> None:
        wide = weight.float()
        codes = (wide * (127 / wide.abs().amax(-1, keepdim=True).clamp(min=1e-12))).round().to(torch.int8)
        self.tensors, self.reference = (codes,), codes[self.columns]

    @override
    def sampled_activation(self, x, rows):
        return x.int8[0][rows].double()

    @override
    def run(self, x, tensors):
        return torch._int_mm(x.int8[0], tensors[0].t())


class Tinygemm(Peer):
    """W4A16, one bf16 scale and zero per group of 128."""

    name, title = "tinygemm", "W4A16 g128, `torch.ops.aten._weight_int4pack_mm`"
    four_bit = True
    max_tokens = 256  # 2 ms there already

    @override
    def prepare(self, weight: Tensor) -> None:
        codes, scale = int4_groups(weight, GROUP_SIZE)
        wide = codes[self.columns].float().sub_(8).unflatten(-1, (-1, GROUP_SIZE))
        self.reference = (wide * scale[self.columns].unsqueeze(-1)).flatten(-2)
        packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], INNER_K_TILES)
        scale_and_zero = torch.stack([scale.t(), torch.zeros_like(scale.t())], dim=-1).to(torch.bfloat16)
        self.tensors = (packed, scale_and_zero.contiguous())

    @override
    def run(self, x, tensors):
        return torch.ops.aten._weight_int4pack_mm(x.bf16, tensors[0], GROUP_SIZE, tensors[1])


PEERS = (Bf16, Fp8, Fp8Default, Int8Mm, Tinygemm)
