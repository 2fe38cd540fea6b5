"""gemlite 0.6.0.post2 (Triton).

It autotunes every (shape, M) that its shipped table for the GPU does not hold, half a minute each; only W4A16 g128 of the
Llama-3-8B shapes is there. Other points are refused unless ``--gemlite-tune`` is given.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from .base import Peer, Unavailable, int4_groups


class GemliteW4A16(Peer):
    """bf16 activations, groups of 128."""

    name, title = "gemlite_w4a16", "gemlite W4A16 g128"
    four_bit = True
    group_size = 128

    @classmethod
    @override
    def require(cls) -> None:
        import gemlite.core  # noqa: F401

    @override
    def prepare(self, weight: Tensor) -> None:
        self.pack(weight, self.group_size)

    def pack(self, weight: Tensor, group_size: int) -> None:
        """A ``GemLiteLinear`` with scalar zero point 8."""
        from gemlite.core import DType, GemLiteLinear

        codes, scale = int4_groups(weight, group_size)
        int8 = self.activation == "int8"
        layer = GemLiteLinear(
            W_nbits=4,
            group_size=group_size,
            in_features=self.in_features,
            out_features=self.out_features,
            input_dtype=DType.INT8 if int8 else DType.BF16,
            output_dtype=DType.BF16,
            scaled_activations=int8,
        )
        zeros = 8 if int8 else torch.full_like(scale, 8, dtype=torch.bfloat16)
        layer.pack(codes, scale.to(torch.bfloat16), zeros, fma_mode=not int8)
        self.meta, self.tensors = layer.get_meta_args(), tuple(t.detach() for t in layer.get_tensor_args())
        wide = codes[self.columns].float().sub_(8).unflatten(-1, (-1, group_size))
        self.reference = (wide * scale[self.columns].unsqueeze(-1)).flatten(-2)

    @override
    def refuse(self, tokens: int) -> str | None:
        from gemlite import core
        from gemlite.triton_kernels import utils

        meta = self.meta
        table = core.GEMLITE_TRITON_CONFIG_CACHE.get(core.get_matmul_type(tokens, 4), {})
        dtype = 1 if meta[5] == 2 else meta[5]  # its table knows bf16 as fp16
        key = (utils.get_closest_m(tokens), self.out_features, self.in_features, meta[2], meta[4], dtype * 100 + 4)
        if str(key) in table or self.options.gemlite_tune:
            return None
        return "would autotune where gemlite ships no tile (--gemlite-tune allows it)"

    @override
    def run(self, x, tensors):
        from gemlite.core import forward_functional

        return forward_functional(x.bf16, None, list(tensors), self.meta)


class GemliteW4A8(GemliteW4A16):
    """int8 activations; gemlite has them per channel only."""

    name, title = "gemlite_w4a8", "gemlite W4A8 per channel"
    activation = "int8"

    @override
    def prepare(self, weight: Tensor) -> None:
        self.pack(weight, self.in_features)
        if self.meta[9] != 3:
            raise Unavailable(f"gemlite chose channel_scale_mode={self.meta[9]}, not weight and activation")

    @override
    def run(self, x, tensors):
        """``forward_functional`` without its quantization of the activation."""
        from gemlite import core

        xq, token_scale = x.int8
        kernel = core.GEMLITE_TRITON_MAPPING[core.get_matmul_type(xq.shape[0], 4)]
        type_id = self.meta[5] * 100 + 4
        return kernel.forward(xq, *tensors[:3], token_scale, *self.meta[1:-1], True, type_id, meta_scale=0.0)


PEERS = (GemliteW4A16, GemliteW4A8)
