"""Shards of quantized weights, without ranks: the same integers, and accumulators that add up."""

from __future__ import annotations

import pytest
import torch

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import ShardingError
from intscale_compile.kernels.w4a8_linear import reference_accumulate
from intscale_compile.parallel.sharding import Layout, shard, shard_features, unshard
from intscale_compile.saving.shard_reading import StoredPart

CONFIGS = {
    "group 32": IntScaleConfig(32),
    "group 64": IntScaleConfig(64),
    "group 128": IntScaleConfig(128),
    "group 256": IntScaleConfig(256),
    "wide scales": IntScaleConfig(64, scale_bits=8),
    "per channel": IntScaleConfig(-1),
    "8 bits": IntScaleConfig(weight_bits=8),
}


def random_weight(config: IntScaleConfig, rows: int = 192, features: int = 1024, asymmetric: bool = False):
    if not asymmetric:
        return IntScaleTensor.from_hp(torch.randn(rows, features), config)
    groups = -(-features // config.group_size)
    return IntScaleTensor.from_codes(
        torch.randint(-8, 8, (rows, features), dtype=torch.int8),
        torch.rand(rows, groups) + 0.5,
        group_size=config.group_size,
        zero_point=torch.randint(-4, 4, (rows, groups), dtype=torch.int8),
    )


def accumulator(weight: IntScaleTensor, xq: torch.Tensor) -> torch.Tensor:
    """The int32 accumulator, exact."""
    return reference_accumulate(
        xq, weight.qdata, weight.scale, weight.out_features, weight.group_size, weight.packing_format, weight.zero_point
    )


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("name", [*CONFIGS, "asymmetric"])
def test_accumulators_of_feature_shards_add_up(name, packing):
    asymmetric = name == "asymmetric"
    whole = random_weight(CONFIGS.get(name, IntScaleConfig(64)), asymmetric=asymmetric).to_packing(packing)
    assert (whole.zero_point is not None) == asymmetric
    xq = torch.randint(-127, 128, (5, 1024), dtype=torch.int8)
    shards = [shard(whole, 1, i, 4) for i in range(4)]
    parts = [accumulator(s.validate(), xq[:, i * 256 : (i + 1) * 256]) for i, s in enumerate(shards)]
    assert torch.equal(sum(parts), accumulator(whole, xq))
    for i, part in enumerate(shards):
        assert part.packing_format == packing and part.shape == (192, 256)
        assert torch.equal(part.codes, whole.codes[:, i * 256 : (i + 1) * 256])
        assert torch.equal(part.row_scale, whole.row_scale)
        assert all(getattr(part, n).untyped_storage().nbytes() == getattr(part, n).nbytes for n in part.data_names)


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_row_shards_hold_their_rows(name, packing):
    whole = random_weight(CONFIGS[name]).to_packing(packing)
    xq = torch.randint(-127, 128, (5, 1024), dtype=torch.int8)
    shards = [shard(whole, 0, i, 3) for i in range(3)]
    rows = torch.cat([accumulator(s.validate(), xq) for s in shards], dim=1)
    assert torch.equal(rows, accumulator(whole, xq))
    assert torch.equal(torch.cat([s.row_scale for s in shards]), whole.row_scale)


@pytest.mark.parametrize(
    "config, features, cut",
    [
        (IntScaleConfig(32), 192, 96),  # a group boundary within a block of packed codes
        (IntScaleConfig(-1), 300, 77),  # one scale a row: any place
        (IntScaleConfig(weight_bits=8), 300, 77),
        (IntScaleConfig(128), 320, 256),  # the last shard ends in padding
        (IntScaleConfig(256), 384, 256),
        (IntScaleConfig(32), 416, 352),
    ],
)
def test_cuts_within_packing_blocks_and_padding(config, features, cut):
    whole = random_weight(config, 80, features)
    xq = torch.randint(-127, 128, (3, features), dtype=torch.int8)
    first, second = shard_features(whole, 0, cut), shard_features(whole, cut, features)
    for part in (first, second):
        part.validate()
    total = accumulator(first, xq[:, :cut]) + accumulator(second, xq[:, cut:])
    assert torch.equal(total, accumulator(whole, xq))
    assert torch.equal(first.dequantize(), whole.dequantize()[:, :cut])
    assert torch.equal(second.dequantize(), whole.dequantize()[:, cut:])


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_of_experts(transposed):
    stack = IntScaleTensor.from_hp(torch.randn(4, 128, 256), IntScaleConfig(64))
    dense = stack.dequantize()
    weight = stack.transpose(-2, -1) if transposed else stack
    rows, features = (2, 1) if transposed else (1, 2)
    orient = (lambda t: t.transpose(-2, -1)) if transposed else (lambda t: t)
    assert torch.equal(shard(weight, features, 1, 2).dequantize(), orient(dense[:, :, 128:]))
    packed = torch.cat([dense[:, 32:64], dense[:, 96:]], dim=1)  # gate and up, each divided
    assert torch.equal(shard(weight, rows, 1, 2, packed=2).dequantize(), orient(packed))
    assert torch.equal(shard(weight, 0, 1, 2).dequantize(), orient(dense[2:]))


def test_static_activation_scale_and_rotation_stay():
    whole = random_weight(IntScaleConfig(64)).with_activation_scale(0.02).with_rotation(128)
    part = shard(whole, 1, 1, 2).validate()
    assert part.rotation == 128 and torch.equal(part.activation_scale, whole.activation_scale)
    x = torch.randn(6, 1024)
    from intscale_compile.kernels.hadamard import hadamard_transform
    from intscale_compile.kernels.quantize_static import quantize_static_aten

    halves = [quantize_static_aten(hadamard_transform(h, 128), whole.activation_scale)[0] for h in x.chunk(2, -1)]
    xq = quantize_static_aten(hadamard_transform(x, 128), whole.activation_scale)[0]
    total = sum(accumulator(shard(whole, 1, i, 2), half) for i, half in enumerate(halves))
    assert torch.equal(total, accumulator(whole, xq))  # one scale for all: the whole layer to the bit


def test_refused_cuts_say_what_to_do():
    weight = random_weight(IntScaleConfig(128), 96, 384)
    with pytest.raises(
        ShardingError, match=r"mlp.down: input features 0:192 of 384 cut .* group of 128 .*group_size=64"
    ):
        shard(weight, 1, 0, 2, name="mlp.down")
    with pytest.raises(ShardingError, match=r"group of 64 .* group_size=-1"):
        shard_features(random_weight(IntScaleConfig(64), 96, 384), 0, 100)
    with pytest.raises(ShardingError, match="384 features cannot be divided evenly among 5 ranks"):
        shard(weight, 1, 0, 5)
    with pytest.raises(ShardingError, match="96 features cannot be divided evenly among 7 ranks"):
        shard(weight, 0, 0, 7)
    rotated = random_weight(IntScaleConfig(64), 96, 384).with_rotation(128)
    with pytest.raises(ShardingError, match="cut through a block of its rotation of 128"):
        shard(rotated, 1, 0, 2)
    with pytest.raises(ShardingError, match="use another number of ranks"):
        weight.chunk(2, dim=1)


def test_chunk_is_what_distribute_tensor_calls():
    whole = random_weight(IntScaleConfig(32), 96, 384).to_packing("tiled")
    for i, part in enumerate(torch.chunk(whole, 4, dim=1)):
        expected = shard(whole, 1, i, 4)
        assert all(torch.equal(getattr(part, n), getattr(expected, n)) for n in part.data_names)
    assert [tuple(part.shape) for part in whole.to_packing("plain").t().chunk(2, dim=1)] == [(384, 48), (384, 48)]


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("name", [*CONFIGS, "asymmetric"])
def test_stored_parts_are_read_by_rows_and_features(name, packing):
    """What a rank reads of a file are the parts of its shard, whatever the packing on disk."""
    plain = random_weight(CONFIGS.get(name, IntScaleConfig(64)), 128, 1024, name == "asymmetric")
    whole = plain.to_packing(packing)
    for dim, index, ranges in (
        (1, 1, (slice(None), slice(256, 512))),
        (0, 2, (slice(64, 96), slice(None))),
    ):
        expected = shard(plain, dim, index, 4)
        for part in whole.data_names:
            stored = StoredPart(getattr(whole, part), part, Layout.of(whole), False)
            assert stored.get_shape() == [128, 1024]
            assert torch.equal(stored[ranges], getattr(expected, part)), part
    with pytest.raises(ShardingError, match="proj"):
        shard_features(random_weight(IntScaleConfig(128), 128, 1024), 64, 1024, "proj")


def same_bits(found: IntScaleTensor, wanted: IntScaleTensor) -> bool:
    """Whether two weights have the same parts, padding included, and the same attributes."""
    return found.__tensor_flatten__() == wanted.__tensor_flatten__() and all(
        getattr(found, n).dtype == getattr(wanted, n).dtype and torch.equal(getattr(found, n), getattr(wanted, n))
        for n in wanted.data_names
    )


@pytest.mark.parametrize("packing", ["plain", "tiled"])
@pytest.mark.parametrize("name", [*CONFIGS, "asymmetric"])
def test_joined_shards_are_the_weight_again(name, packing):
    whole = random_weight(CONFIGS.get(name, IntScaleConfig(64)), 96, 1024, name == "asymmetric").to_packing(packing)
    whole = whole.with_activation_scale(0.02)
    for dim in (0, 1):
        shards = [shard(whole, dim, i, 4) for i in range(4)]
        assert same_bits(unshard(shards, dim), whole)
        assert same_bits(unshard([s.t() for s in shards], 1 - dim), whole.t())
    packed = [shard(whole, 0, i, 3, packed=2) for i in range(3)]
    assert same_bits(unshard(packed, 0, packed=2), whole)


def test_joined_cuts_within_packing_blocks_and_padding():
    for config, features, count in (
        (IntScaleConfig(32), 288, 3),
        (IntScaleConfig(-1), 300, 4),
        (IntScaleConfig(256), 768, 3),
    ):
        whole = random_weight(config, 80, features)
        assert same_bits(unshard([shard(whole, 1, i, count) for i in range(count)], 1), whole)
    uneven = random_weight(IntScaleConfig(128), 80, 320)
    assert same_bits(unshard([shard_features(uneven, 0, 256), shard_features(uneven, 256, 320)], 1), uneven)
    stack = IntScaleTensor.from_hp(torch.randn(4, 128, 256), IntScaleConfig(64))
    for dim in range(3):
        assert same_bits(unshard([shard(stack, dim, i, 2) for i in range(2)], dim), stack)
    assert same_bits(unshard([shard(stack, 1, i, 2, packed=2) for i in range(2)], 1, packed=2), stack)


def test_shards_that_were_quantized_apart_are_not_joined():
    apart = [random_weight(IntScaleConfig(64), 64, 128) for _ in range(2)]
    assert unshard(apart, 0).shape == (128, 128)
    with pytest.raises(ShardingError, match="mlp.down: its shards have different row scales"):
        unshard(apart, 1, name="mlp.down")
