"""The stored format: packing, padding, tiles and the overflow proof, as pure functions of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile import format as fmt
from intscale_compile.config import GROUP_SIZES

GROUP = st.sampled_from(GROUP_SIZES)
quick = settings(max_examples=40, deadline=None)


def random_codes(shape, seed, low=-8, high=8):
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_nibble_order_is_the_documented_one(group_size):
    """Byte j of a block: k = j in the low nibble, k = j + P/2 in the high one, both as q + 8. Two blocks, two rows."""
    block = 64 if group_size in (32, 64) else 128
    assert fmt.pack_block(group_size) == block
    codes = random_codes((2, 2 * block), 1)
    packed = fmt.pack_int4(codes, group_size)
    assert packed.dtype == torch.uint8 and packed.shape == (2, block)
    for n in range(2):
        for b in range(2):
            for j in range(block // 2):
                low, high = int(codes[n, b * block + j]), int(codes[n, b * block + j + block // 2])
                assert int(packed[n, b * block // 2 + j]) == (low + 8) | (high + 8) << 4


def test_nibbles_of_a_written_out_example():
    """Readable without the loop above: q[0] = -8, q[64] = 7 share byte 0; q[1] = 3, q[65] = -1 share byte 1."""
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, 0], codes[0, 64], codes[0, 1], codes[0, 65] = -8, 7, 3, -1
    packed = fmt.pack_int4(codes, 128)
    assert packed[0, :3].tolist() == [0xF0, 0x7B, fmt.ZERO_BYTE]
    # With groups of 64 the halves are 32 apart.
    codes = torch.zeros(1, 64, dtype=torch.int8)
    codes[0, 0], codes[0, 32] = -8, 7
    assert fmt.pack_int4(codes, 64)[0, 0] == 0xF0


def test_every_byte_survives():
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).reshape(4, 64)
    for group_size in GROUP_SIZES:
        codes = fmt.unpack_int4(every, group_size)
        assert codes.min() == -8 and codes.max() == 7
        assert torch.equal(fmt.pack_int4(codes, group_size), every)


@quick
@given(
    group_size=GROUP,
    rows=st.integers(1, 5),
    in_features=st.integers(1, 600),
    experts=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_pad_and_pack_round_trip(group_size, rows, in_features, experts, seed):
    shape = (*((experts,) if experts else ()), rows, in_features)
    codes = random_codes(shape, seed)
    padded = fmt.pad_codes(codes, in_features, group_size)
    align = max(group_size, fmt.pack_block(group_size))
    assert padded.shape[-1] % align == 0 and 0 <= padded.shape[-1] - in_features < align
    back = fmt.unpack_int4(fmt.pack_int4(padded, group_size), group_size)
    assert back.dtype == torch.int8
    assert torch.equal(back[..., :in_features], codes)
    assert not back[..., in_features:].any()
    groups = fmt.num_groups(in_features, group_size)
    assert groups == 1 if group_size == -1 else groups * group_size == padded.shape[-1]


@quick
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 6),
    block=st.sampled_from([1, 32, 64, 128]),
    fill=st.sampled_from([0, 1, 0x88]),
    experts=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_tile_round_trip(rows, columns, block, fill, experts, seed):
    lead = (experts,) if experts else ()
    plain = random_codes((*lead, rows, columns * block), seed, 0, 127).to(torch.uint8)
    tiled = fmt.tile_rows(plain, block, fill)
    padded_rows = -(-rows // 64) * 64
    assert tiled.shape == (*lead, padded_rows, columns * block) and tiled.is_contiguous()
    assert torch.equal(fmt.untile_rows(tiled, rows, block), plain)
    # Memory is [N/64][columns][64 rows][block]; look every tile up where the kernel will.
    memory = tiled.reshape(*lead, padded_rows // 64, columns, 64, block)
    widened = torch.full((*lead, padded_rows, columns * block), fill, dtype=torch.uint8)
    widened[..., :rows, :] = plain
    for tile in range(padded_rows // 64):
        for column in range(columns):
            wanted = widened[..., tile * 64 : tile * 64 + 64, column * block : column * block + block]
            assert torch.equal(memory[..., tile, column, :, :], wanted)


@settings(max_examples=30, deadline=None)
@given(
    group_size=GROUP,
    weight_bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 130),
    in_features=st.integers(1, 300),
    seed=st.integers(0, 9),
)
def test_tensor_padding_is_zeros_with_scale_one(group_size, weight_bits, rows, in_features, seed):
    """Also through the quantizer and both packings: what pads is code 0 and scale 1, so that no kernel needs a mask
    for it.
    """
    config = IntScaleConfig(
        group_size=-1 if weight_bits == 8 else group_size, weight_bits=weight_bits, scale_search="absmax"
    )
    weight = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))
    plain = IntScaleTensor.from_hp(weight, config)
    group_size = config.effective_group_size
    codes = plain.qdata if weight_bits == 8 else fmt.unpack_int4(plain.qdata, group_size)
    assert not codes[:, in_features:].any()
    if group_size != -1:
        assert (plain.scale[:, -(-in_features // group_size) :] == 1).all()
    tiled = plain.to_packing("tiled")
    assert tiled.qdata.shape[0] % 64 == 0 and tiled.shape == plain.shape
    columns = fmt.code_block_columns(group_size, weight_bits)
    all_rows = tiled.qdata.shape[0]
    padding = fmt.untile_rows(tiled.qdata, all_rows, columns)[rows:]
    assert (padding == (0 if weight_bits == 8 else fmt.ZERO_BYTE)).all()
    assert (fmt.untile_rows(tiled.scale, all_rows, 1)[rows:] == 1).all()
    back = tiled.to_packing("plain")
    for name in plain.tensor_data_names:
        assert torch.equal(getattr(back, name), getattr(plain, name))
    assert torch.equal(tiled.dequantize(), plain.dequantize())
    assert torch.equal(tiled.codes, plain.codes) and torch.equal(tiled.group_scale, plain.group_scale)


@quick
@given(
    groups=st.integers(1, 6),
    group_size=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 4),
    top=st.sampled_from([1, 15, 255, 32767]),
    low=st.sampled_from([-8, -128]),
    seed=st.integers(0, 999),
)
def test_bound_is_attained_and_never_exceeded(groups, group_size, rows, top, low, seed):
    """The proof is exact: sign-matched activations reach the bound, any others (and any partial sum) stay within it."""
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes((rows, groups * group_size), seed, low, -low)
    scale = torch.randint(1, top + 1, (rows, groups), generator=generator)
    scale = scale.to(torch.int16 if top > 255 else torch.uint8)
    bound = fmt.accumulator_bound(codes, scale)
    assert bound.dtype == torch.int64
    products = codes.long() * fmt.expand_group_scale(scale.long(), codes.shape[-1])
    worst = torch.where(codes < 0, -127, 127)
    assert torch.equal((products * worst).sum(-1), bound)
    assert torch.equal((products * -worst).sum(-1), -bound)
    x = random_codes((16, codes.shape[-1]), seed + 1, -127, 128).long()
    partial = (x[:, None, :] * products).cumsum(-1).abs().amax(-1)
    assert (partial <= bound).all()
    order = torch.randperm(codes.shape[-1], generator=generator)
    assert ((x[:, None, :] * products)[..., order].cumsum(-1).abs().amax(-1) <= bound).all()


@pytest.mark.parametrize("over", [False, True])
def test_bound_on_both_sides_of_int32(over):
    """127 * 8 * 255 * K passes 2**31 between K = 8289 and 8320: the largest magnitude code, -8, must not wrap to
    int8.
    """
    in_features = 8320 if over else 8256
    codes = torch.full((1, in_features), -8, dtype=torch.int8)
    scale = torch.full((1, in_features // 32), 255, dtype=torch.uint8)
    bound = int(fmt.accumulator_bound(codes, scale))
    assert bound == 127 * 8 * 255 * in_features
    assert (bound > fmt.INT32_MAX) is over


def test_bound_counts_int8_code_minus_128():
    """abs(-128) does not fit int8; an 8-bit checkpoint may hold it."""
    codes = torch.full((2, 128), -128, dtype=torch.int8)
    bound = fmt.accumulator_bound(codes, torch.ones(2, 1, dtype=torch.uint8))
    assert bound.tolist() == [127 * 128 * 128] * 2


def test_default_scale_bits_need_no_proof_up_to_140000_features():
    """4-bit scales cannot overflow for any K <= 140 000."""
    assert fmt.INT32_MAX >= 127 * 8 * 15 * 140_000
    codes = torch.full((1, 140_032), -8, dtype=torch.int8)
    scale = torch.full((1, 140_032 // 32), 15, dtype=torch.uint8)
    assert int(fmt.accumulator_bound(codes, scale)) <= fmt.INT32_MAX
