"""Our kernel: integer scales in their variants, and float scales in the same kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.format import tile_rows
from intscale_compile.kernels.triton_gemm import accumulate_cuda, linear_cuda
from intscale_compile.kernels.w4a8_linear import apply_scales, reference_accumulate

from .base import Activations, Peer, WrongResult

BF16_ULP = 2.0**-7  # the largest relative distance of two neighbouring bf16 numbers


class IntScale(Peer):
    """What a compiled model gets: the default configuration, kernel and tile from the shipped table.

    Launched as the passes launch it, ``overlap=True``: a kernel begins to read its weights while the one before it ends.
    """

    name, title = "intscale", "W4A8 g128, 4-bit integer scales (default)"
    ours = four_bit = True
    activation = "int8"
    config = IntScaleConfig()
    overlap = True

    @override
    def prepare(self, weight: Tensor) -> None:
        self.packed = packed = IntScaleTensor.from_hp(weight, self.config)
        self.tensors = (packed.qdata, packed.scale, packed.row_scale)
        plain = packed.to_packing("plain")
        self.sampled_weight = tuple(t[self.columns] for t in (plain.qdata, plain.scale, plain.row_scale))

    @override
    def run(self, x, tensors):
        t, (xq, token_scale), (qdata, scale, row_scale) = self.packed, x.int8, tensors
        return linear_cuda(
            xq, token_scale, qdata, scale, row_scale, None,
            t.out_features, t.group_size, t.scale_bits, t.packing_format, torch.bfloat16,
            overlap=self.overlap,
        )  # fmt: skip

    def compare(self, x: Activations, rows: Tensor, sample: Tensor) -> float:
        """Within one bf16 ulp of the exact integer accumulator; with ``--exact`` the accumulator too, bit for bit."""
        (xq, token_scale), (qdata, scale, row_scale) = x.int8, self.sampled_weight
        acc = reference_accumulate(xq[rows], qdata, scale, len(self.columns), self.packed.group_size, "plain")
        expected = apply_scales(acc, token_scale[rows], row_scale, None, torch.bfloat16).double()
        error = (sample.double() - expected).abs()
        if not bool((error <= BF16_ULP * expected.abs()).all()):
            raise WrongResult(f"{int((error > BF16_ULP * expected.abs()).sum())} sampled outputs are wrong")
        if self.options.exact:
            self.compare_accumulator(x, rows, acc)
        return (error.norm() / expected.norm()).item()

    def compare_accumulator(self, x: Activations, rows: Tensor, expected: Tensor) -> None:
        """Bit for bit; costs a compilation for each tile shape."""
        t = self.packed
        acc = accumulate_cuda(x.int8[0], t.qdata, t.scale, t.out_features, t.group_size, t.scale_bits, t.packing_format)
        if not torch.equal(acc[rows][:, self.columns], expected):
            raise WrongResult("the int32 accumulator differs from the reference")


class IntScaleSerial(IntScale):
    """What eager calls get: each kernel begins when the one before it has ended."""

    name, title = "intscale_serial", "W4A8 g128, default, launched one after the other"
    overlap = False


class IntScale8(IntScale):
    """Scales too wide to fold, applied to the accumulator of each group."""

    name, title = "intscale_sb8", "W4A8 g128, 8-bit integer scales"
    config = IntScaleConfig(scale_bits=8)


class IntScale32(IntScale):
    """Groups of 32, as the preset ``best`` has them."""

    name, title = "intscale_g32", "W4A8 g32, 4-bit integer scales"
    config = IntScaleConfig(group_size=32)


class IntScaleChannel(IntScale):
    """One group per row."""

    name, title = "intscale_ch", "W4A8 per channel"
    config = IntScaleConfig(group_size=-1)


class IntScaleW8A8(IntScale):
    """8-bit weights."""

    name, title = "intscale_w8a8", "W8A8 per channel"
    four_bit = False
    config = IntScaleConfig(weight_bits=8)


class FloatScale(Peer):
    """Float group scales in our kernel, on the codes of the default configuration."""

    name, title = "float_scale", "W4A8 g128, float scales in our kernel (ablation)"
    ours = four_bit = True
    activation = "int8"

    @classmethod
    @override
    def require(cls) -> None:
        import float_scale  # noqa: F401

    @override
    def prepare(self, weight: Tensor) -> None:
        t = IntScaleTensor.from_hp(weight, IntScale.config)
        scale = t.group_scale.float() * t.row_scale
        if t.packing_format == "tiled":
            scale = tile_rows(scale, 1, 1)
        self.group_size, self.tensors = t.group_size, (t.qdata, scale.contiguous())
        self.reference = t.dequantize(torch.float32)[self.columns]

    @override
    def run(self, x, tensors):
        from float_scale import linear_float_scale

        xq, token_scale = x.int8
        return linear_float_scale(xq, token_scale, *tensors, self.out_features, self.group_size, torch.bfloat16)


PEERS = (IntScale, IntScaleSerial, IntScale8, IntScale32, IntScaleChannel, IntScaleW8A8, FloatScale)
