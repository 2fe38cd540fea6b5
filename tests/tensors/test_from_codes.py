"""``IntScaleTensor.from_codes``: codes stay, float scales become integers, and what cannot be carried is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import ConfigError, OverflowProofError, WeightError
from intscale_compile.kernels.w4a8_linear import ACCUMULATE_OP
from intscale_compile.ops import KERNEL_ABI
from intscale_compile.tensors.from_codes import scale_rounding_snr
from tests.support.compiled import rewritten

GROUP_SIZES = (32, 64, 128, 256, -1)


def checkpoint(n=70, k=200, group_size=128, asymmetric=False, seed=0):
    """Codes, float scales and zero points as a checkpoint holds them; scales differ by a factor of up to 40."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, groups, generator=generator) * 0.01 + 2.5e-4
    zero = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8) if asymmetric else None
    return codes, scale, zero


def dense(codes, scale, zero, group_size):
    """What the checkpoint's own dequantization gives, fp64."""
    k = codes.shape[-1]
    expand = lambda part: part.double().repeat_interleave(k if group_size == -1 else group_size, -1)[..., :k]  # noqa: E731
    return (codes.double() - (0 if zero is None else expand(zero))) * expand(scale)


def snr(wanted, found):
    noise = float((wanted - found.double()).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(wanted.square().sum()) / noise)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("packing", ["plain", "tiled"])
def test_codes_stay_and_scales_are_close(group_size, asymmetric, packing):
    codes, scale, zero = checkpoint(k=600, group_size=group_size, asymmetric=asymmetric)
    tensor = IntScaleTensor.from_codes(codes, scale, zero_point=zero, group_size=group_size, packing_format=packing)
    tensor.validate()
    assert torch.equal(tensor.codes, codes)
    if asymmetric:
        groups = scale.shape[-1]
        assert torch.equal(tensor.group_zero_point[:, :groups], zero) and not tensor.group_zero_point[:, groups:].any()
    found = snr(dense(codes, scale, zero, group_size), tensor.dequantize(torch.float32))
    assert found > (140 if group_size == -1 else 50)
    if group_size != -1:  # the report counts the rounding of scales, not that of the fp32 result
        assert abs(scale_rounding_snr(tensor, scale) - found) < 0.01


def test_the_row_scale_is_searched():
    """Better than ``max / 255`` for every row, and by some dB on the whole."""
    codes, scale, _ = checkpoint(n=256, k=1024, group_size=32)
    tensor = IntScaleTensor.from_codes(codes, scale, group_size=32)
    wanted = dense(codes, scale, None, 32)
    plain_row = scale.amax(-1, keepdim=True) / 255
    plain = dense(codes, (scale / plain_row).round().clamp(1) * plain_row, None, 32)
    searched = tensor.dequantize(torch.float32).double()
    error, plain_error = ((wanted - w).square().sum(-1) for w in (searched, plain))
    assert (error <= plain_error * 1.0001).all() and snr(wanted, searched) > snr(wanted, plain) + 1


def test_fewer_bits_lose_more():
    codes, scale, _ = checkpoint(k=512, group_size=64)
    losses = [
        scale_rounding_snr(IntScaleTensor.from_codes(codes, scale, group_size=64, scale_bits=b), scale)
        for b in range(1, 9)
    ]
    assert losses == sorted(losses) and losses[-1] - losses[3] > 20


@pytest.mark.parametrize("amplifier", [1024, "layer"])
def test_amplifier(amplifier):
    """The published scheme, scale by scale."""
    codes, scale, _ = checkpoint()
    tensor = IntScaleTensor.from_codes(codes, scale, group_size=128, amplifier=amplifier)
    power = 1 / float(tensor.row_scale[0])
    assert (tensor.row_scale == tensor.row_scale[0]).all() and power == int(power)
    if amplifier == "layer":
        assert float(scale.min()) * power >= 1 > float(scale.min()) * power / 2
    else:
        assert power == amplifier
    assert torch.equal(tensor.group_scale.double(), (scale.double() * power).round().clamp(min=1))
    assert torch.equal(tensor.codes, codes)


def test_groups_with_scale_zero_are_zero():
    for asymmetric in (False, True):
        codes, scale, zero = checkpoint(asymmetric=asymmetric)
        scale[3, 1] = scale[5] = 0
        tensor = IntScaleTensor.from_codes(codes, scale, zero_point=zero, group_size=128)
        found = tensor.validate().dequantize(torch.float32)
        assert not found[3, 128:].any() and not found[5].any() and int(tensor.group_scale[3, 1]) == 1
        changed = torch.zeros_like(codes, dtype=torch.bool)
        changed[3, 128:] = changed[5] = True
        assert torch.equal(tensor.codes[~changed], codes[~changed])
        assert snr(dense(codes, scale, zero, 128), found) > 50


def test_negative_scales():
    """Mirrored exactly where a mirror image exists; with zero points it always does."""
    codes, scale, zero = checkpoint(asymmetric=True)
    scale[::3, 0] *= -1
    tensor = IntScaleTensor.from_codes(codes, scale, zero_point=zero, group_size=128).validate()
    assert snr(dense(codes, scale, zero, 128), tensor.dequantize(torch.float32)) > 50
    with pytest.raises(WeightError, match="row 0 has a negative group scale and a code of -8.*zero_point=torch.zeros"):
        IntScaleTensor.from_codes(codes, scale, group_size=128, name="model.w")
    carried = IntScaleTensor.from_codes(
        codes, scale, zero_point=torch.zeros_like(scale, dtype=torch.int8), group_size=128
    )
    assert snr(dense(codes, scale, None, 128), carried.dequantize(torch.float32)) > 50
    mirrored = IntScaleTensor.from_codes(codes.clamp(min=-7), scale, group_size=128)
    assert mirrored.zero_point is None
    assert snr(dense(codes.clamp(min=-7), scale, None, 128), mirrored.dequantize(torch.float32)) > 50


def test_long_rows_get_fewer_bits():
    """The proof decides row by row: a row that cannot have 8 bits has 7."""
    codes = torch.full((2, 32768), 7, dtype=torch.int8)
    codes[1] = torch.randint(-1, 2, (32768,), dtype=torch.int8)
    scale = torch.full((2, 256), 0.01)
    tensor = IntScaleTensor.from_codes(codes, scale, group_size=128).validate()
    assert int(tensor.group_scale[0].max()) <= 127 < int(tensor.group_scale[1].max())
    assert torch.equal(tensor.codes, codes)
    with pytest.raises(OverflowProofError, match="smaller amplifier than 20000"):
        IntScaleTensor.from_codes(codes, scale, group_size=128, amplifier=20000)
    with pytest.raises(OverflowProofError, match="more than 16 bits"):
        IntScaleTensor.from_codes(codes, scale * 10, group_size=128, amplifier=1 << 20)


def test_eight_bits_and_stacks():
    codes = torch.randint(-127, 128, (3, 40, 100), dtype=torch.int8)
    scale = torch.rand(3, 40, 1) + 0.1
    stack = IntScaleTensor.from_codes(codes, scale, group_size=-1, weight_bits=8, dtype=torch.float32).validate()
    assert stack.shape == (3, 40, 100) and stack.weight_bits == 8 and stack.dtype == torch.float32
    assert torch.equal(stack.codes, codes) and torch.equal(stack.row_scale, scale)
    codes, scale, zero = checkpoint(asymmetric=True)
    parts = torch.stack([codes, codes.flip(0)]), torch.stack([scale, scale.flip(0)]), torch.stack([zero, zero.flip(0)])
    pair = IntScaleTensor.from_codes(parts[0], parts[1], zero_point=parts[2], group_size=128).validate()
    assert torch.equal(pair.codes, parts[0]) and torch.equal(pair[1].dequantize(), pair[0].dequantize().flip(0))
    assert scale_rounding_snr(pair, parts[1]) > 50


def test_tiny_scales_and_zero_rows():
    codes, scale, _ = checkpoint()
    tiny = IntScaleTensor.from_codes(codes, scale * 1e-30, group_size=128).validate()
    assert scale_rounding_snr(tiny, scale * 1e-30) > 50
    nothing = IntScaleTensor.from_codes(codes * 0, scale, group_size=128).validate()
    assert not nothing.dequantize().any()


BAD = {
    "codes dtype": (dict(codes=lambda c: c.int()), WeightError, "codes are torch.int32"),
    "codes range": (dict(codes=lambda c: c + 8), WeightError, r"codes lie in \[0, 15\], not in \[-8, 7\]"),
    "scale shape": (dict(scale=lambda s: s[:, :1]), WeightError, r"need \(70, 2\)"),
    "scale nan": (dict(scale=lambda s: s * float("nan")), WeightError, "NaN or Inf"),
    "scale integers": (dict(scale=lambda s: s.int()), WeightError, "group_scale is torch.int32"),
    "zero range": (dict(zero=lambda z: z + 16), WeightError, "subtract 8 from zero points"),
    "zero shape": (dict(zero=lambda z: z[:1]), WeightError, "zero_point is"),
    "zero floats": (dict(zero=lambda z: z.float()), WeightError, "zero_point is torch.float32"),
    "group size": (dict(group_size=48), ConfigError, "group_size=48"),
    "scale bits": (dict(scale_bits=9), ConfigError, "scale_bits=9"),
    "amplifier": (dict(amplifier="column"), ConfigError, "amplifier='column'"),
    "eight bits": (dict(weight_bits=8), ConfigError, "per channel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    change, error, message = BAD[name]
    codes, scale, zero = checkpoint(asymmetric=True)
    parts = {"codes": codes, "scale": scale, "zero": zero}
    options = {key: value for key, value in change.items() if key not in parts} | {"group_size": 128} | change
    parts = {key: change[key](value) if key in change else value for key, value in parts.items()}
    options = {key: value for key, value in options.items() if key not in parts}
    with pytest.raises(error, match=message):
        IntScaleTensor.from_codes(parts["codes"], parts["scale"], zero_point=parts["zero"], **options)


def test_parts_are_laid_out_alike():
    """``[1, N].t().contiguous()`` keeps the strides (1, N), which compiled code of another weight's layout refuses."""
    codes = torch.randint(-8, 8, (128, 64), dtype=torch.int8).t()
    scale, zero = torch.rand(1, 64).t() + 0.5, torch.randint(-8, 8, (1, 64), dtype=torch.int8).t()
    strided = IntScaleTensor.from_codes(codes, scale, group_size=-1, zero_point=zero.contiguous())
    dense = IntScaleTensor.from_hp(torch.randn(128, 64).t(), IntScaleConfig(group_size=-1))
    for tensor in (strided, dense, strided.with_activation_scale(torch.rand(1, 1, 1).expand(1, 1, 1)[0])):
        for name in tensor.data_names:
            part = getattr(tensor, name)
            assert part.stride() == torch.empty(part.shape).stride(), name
    plain = IntScaleTensor.from_codes(codes, scale.clone(), group_size=-1, zero_point=zero.reshape(-1).view(64, 1))
    assert torch.equal(plain.dequantize(), strided.dequantize())


def test_merged_weights_per_channel_with_zero_points():
    """Two of them that read one activation become one product."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(128, 64, bias=False), nn.Linear(128, 64, bias=False)
            for layer in (self.q, self.k):
                codes = torch.randint(-8, 8, (64, 128), dtype=torch.int8)
                zero = torch.randint(-8, 8, (1, 64), dtype=torch.int8).t().contiguous()
                weight = IntScaleTensor.from_codes(codes, torch.rand(64, 1) + 0.5, group_size=-1, zero_point=zero)
                layer.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x):
            return self.q(x) + self.k(x)

    model, x = Both(), torch.randn(3, 128)
    with torch.no_grad():
        assert torch.equal(rewritten(model)(x), model(x))
    assert model.q.weight.qdata.untyped_storage().data_ptr() == model.k.weight.qdata.untyped_storage().data_ptr()


# --- minima ---------------------------------------------------------------------------------------------------------


def with_minima(n=70, k=200, group_size=32):
    codes, scale, _ = checkpoint(n, k, group_size)
    minimum = torch.randn(scale.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    expand = lambda part: part.double().repeat_interleave(group_size, -1)[:, :k]  # noqa: E731
    return codes, scale, minimum, lambda scale, minimum: codes.double() * expand(scale) + expand(minimum)


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_minima_become_integers(group_size, packing):
    """Codes stay; products, reference and every structural operator agree with the dense weight."""
    codes, scale, minimum, wanted = with_minima(group_size=group_size)
    form = dict(group_size=group_size, packing_format=packing, dtype=torch.float32)
    tensor = IntScaleTensor.from_codes(codes, scale, minimum=minimum, **form).validate()
    assert torch.equal(tensor.codes, codes) and tensor.zero_point.dtype == torch.int16
    with pytest.raises(ConfigError, match="made with minima"):
        scale_rounding_snr(tensor, scale)
    assert snr(wanted(scale, minimum), tensor.dequantize(torch.float32)) > 55
    exact = codes.double() * tensor.group_scale.repeat_interleave(group_size, -1)[:, :200]
    exact -= tensor.group_zero_point.repeat_interleave(group_size, -1)[:, :200]
    assert torch.equal(tensor.dequantize(), exact.float() * tensor.row_scale)
    xq = torch.randint(-127, 128, (5, 200), dtype=torch.int8)
    where = (70, group_size, tensor.scale_bits, packing, KERNEL_ABI)
    found = ACCUMULATE_OP(xq, tensor.qdata, tensor.scale, *where, zero_point=tensor.zero_point)
    assert torch.equal(found.double(), xq.double() @ exact.t())
    assert tensor.accumulator_bound().equal((127 * exact.abs().sum(-1)).long())
    assert torch.equal(tensor[:64].dequantize(), tensor.dequantize()[:64])
    joined = torch.cat([tensor, IntScaleTensor.from_hp(torch.ones(3, 200), IntScaleConfig(group_size=group_size))])
    assert torch.equal(joined.dequantize()[:70], tensor.dequantize()) and joined[70:].dequantize().unique().numel() == 1


def test_zero_points_joined_with_offsets_keep_their_weights():
    codes, scale, minimum, _ = with_minima()
    zero = torch.randint(-8, 8, scale.shape, dtype=torch.int8)
    form = dict(group_size=32, dtype=torch.float32)
    parts = [
        IntScaleTensor.from_codes(codes, scale, **form, **more) for more in ({"minimum": minimum}, {"zero_point": zero})
    ]
    assert torch.equal(torch.cat(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_negative_and_zero_scales_beside_minima():
    codes, scale, minimum, wanted = with_minima()
    scale[::2] *= -1
    scale[1, 2] = 0.0
    tensor = IntScaleTensor.from_codes(codes, scale, minimum=minimum, group_size=32, dtype=torch.float32).validate()
    assert snr(wanted(scale, minimum), tensor.dequantize(torch.float32)) > 55


def test_minima_are_refused_where_they_cannot_be_held():
    codes, scale, minimum, _ = with_minima()
    for options in ({"scale_bits": 3}, {"amplifier": 64}, {"zero_point": torch.zeros(scale.shape, dtype=torch.int8)}):
        with pytest.raises(ConfigError, match="minim"):
            IntScaleTensor.from_codes(codes, scale, minimum=minimum, group_size=32, **options)
    with pytest.raises(WeightError, match="minimum has NaN"):
        IntScaleTensor.from_codes(codes, scale, minimum=minimum * float("nan"), group_size=32)
    with pytest.raises(WeightError, match="floating point of shape"):
        IntScaleTensor.from_codes(codes, scale, minimum=minimum[:, :2], group_size=32)
    with pytest.raises(WeightError, match="too large beside its scale"):
        IntScaleTensor.from_codes(codes, scale, minimum=minimum * 1e6, group_size=32)
