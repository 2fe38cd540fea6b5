"""Wire formats, the layout of a message, and the quantizer of ``reference.py``: rounding, padding, spikes, NaN."""

from __future__ import annotations

import itertools

import pytest
import torch

from intscale_compile.communication.message import WireFormat, largest_code
from intscale_compile.communication.pieces import pieces
from intscale_compile.communication.reference import (
    SMALLEST_SCALE,
    decode_message,
    encode_message,
    pack_codes,
    quantize_groups,
    round_down,
    round_up,
    unpack_codes,
)
from intscale_compile.errors import ConfigError

FORMATS = [name + spikes for name, spikes in itertools.product(("int8", "int6", "int5", "int4"), ("", "-spikes"))]


def there_and_back(x: torch.Tensor, wire: str, groups: int | None = None) -> torch.Tensor:
    """What arrives of ``x``, through the reduce leg."""
    parsed = WireFormat.parse(wire)
    layout = parsed.layout(groups or -(-x.numel() // parsed.group_size))
    message = torch.empty(layout.nbytes, dtype=torch.uint8)
    encode_message(x, layout, message)
    return decode_message(message, layout)[: x.numel()]


@pytest.mark.parametrize("text", FORMATS)
def test_names_come_back(text):
    wire = WireFormat.parse(text)
    assert str(wire) == text and WireFormat.parse(str(wire)) == wire
    assert wire.group_size == 128 and wire.spike_reserving == ("spikes" in text) and str(wire.bits) in text


def test_names_of_bits():
    assert WireFormat.parse("int6") == WireFormat(6) and WireFormat.parse("int5-spikes") == WireFormat(5, True)
    bad = ("int7", "int6-mixed", "int6-", "int8-g32", "int8-spikes-spikes", "", "INT8", "int8 ", None, 8)
    for text in bad:
        with pytest.raises(ConfigError, match="no wire format"):
            WireFormat.parse(text)
    with pytest.raises(ConfigError, match="7 bits"):
        WireFormat(7)


def test_slices_cover_the_tensor_in_whole_groups():
    wire = WireFormat.parse("int8")
    for elements, ranks in itertools.product((1, 127, 128, 129, 4096, 100003), (2, 3, 4, 8)):
        length = wire.slice_elements(elements, ranks)
        assert length % wire.group_size == 0 and length * ranks >= elements > (length - wire.group_size) * ranks
        bounds = [p.bounds(owner) for owner in range(ranks) for p in pieces(elements, length, wire.group_size, 3)]
        covered = [span for span in bounds if span[0] < span[1]]
        assert covered[0][0] == 0 and covered[-1][1] == elements
        assert all(before[1] == after[0] for before, after in itertools.pairwise(covered))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_planes(bits):
    """Bytes as the layout says, and their inverse."""
    group_size = 128
    codes = torch.randint(0, 2**bits, (5, group_size), dtype=torch.int32)
    layout = WireFormat(bits).layout(5)
    packed = pack_codes(codes, bits)
    assert packed.numel() == layout.code_bytes == 5 * group_size * bits // 8
    assert torch.equal(unpack_codes(packed, layout), codes)
    if bits == 8:
        assert torch.equal(packed.view(5, -1).int(), codes)
        return
    half, quarter, eighth = group_size // 2, group_size // 4, group_size // 8
    for group, j in ((0, 0), (3, 7), (4, half - 1)):
        assert packed[group * half + j] == codes[group, j] & 15 | (codes[group, j + half] & 15) << 4
    for group, j in ((0, 0), (4, eighth - 1)) if bits == 5 else ():
        expected = sum(int(codes[group, j + k * eighth] >> 4) << k for k in range(8))
        assert packed[layout.high_plane + group * eighth + j] == expected
    for group, j in ((0, 0), (2, 5), (4, quarter - 1)) if bits == 6 else ():
        places = (2 * j, 2 * j + 1, half + 2 * j, half + 2 * j + 1)
        expected = sum(int(codes[group, place] >> 4) << 2 * k for k, place in enumerate(places))
        assert packed[layout.high_plane + group * quarter + j] == expected


def test_parts_of_a_message():
    layout = WireFormat.parse("int5-spikes").layout(7)
    assert (layout.high_plane, layout.scales, layout.minimums) == (7 * 64, 7 * 80, 7 * 82)
    assert (layout.spike_values, layout.spike_positions, layout.nbytes) == (7 * 84, 7 * 88, 7 * 90 + 10)
    assert WireFormat.parse("int8").layout(1).nbytes == 144  # 132 and padding
    six = WireFormat.parse("int6")
    assert (six.layout(8).high_plane, six.layout(8).scales) == (8 * 64, 8 * 96)
    assert six.layout(8).nbytes == 8 * (96 + 4)


def line(x: torch.Tensor) -> torch.Tensor:
    """fp32 as integers in their order, neighbours next to each other; a bf16 is a multiple of 65536."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def test_rounding_is_directed():
    parts = [torch.randn(5000), torch.randn(5000) * 1e-42, torch.randn(5000) * 1e37, torch.tensor([0.0, -0.0])]
    values = torch.cat(parts)
    down, up = round_down(values), round_up(values.abs())
    assert torch.equal(line(down), line(values).div(65536, rounding_mode="floor") * 65536)
    assert torch.equal(line(up), -(-line(values.abs())).div(65536, rounding_mode="floor") * 65536)
    assert not torch.signbit(down[values == 0]).any()


@pytest.mark.parametrize("wire", FORMATS)
def test_every_element_is_within_half_a_step(wire):
    """Half a step of its group, and what rounding adds to it; spikes are bf16."""
    parsed = WireFormat.parse(wire)
    x = torch.randn(64 * 128) * torch.logspace(-20, 20, 64).repeat_interleave(128)
    groups = x.view(-1, parsed.group_size)
    extent = groups.amax(1) - groups.amin(1)
    found = there_and_back(x, wire).view_as(groups)
    step = extent / largest_code(parsed.bits) * 1.02 + groups.abs().amax(1) * 2.0**-8 / largest_code(parsed.bits)
    assert ((found - groups).abs() <= 0.501 * step[:, None] + 2.0**-9 * groups.abs() * parsed.spike_reserving).all()
    if parsed.spike_reserving:
        for at in (groups.argmin(1, True), groups.argmax(1, True)):
            assert torch.equal(found.gather(1, at), groups.gather(1, at).bfloat16().float())


@pytest.mark.parametrize("wire", FORMATS)
def test_exact_where_it_can_be(wire):
    for value in (0.0, 1.5, -(2.0**-120), 3.0e38):
        constant = torch.full((300,), value).bfloat16().float()
        assert torch.equal(there_and_back(constant, wire), constant), value
    parsed = WireFormat.parse(wire)
    largest = largest_code(parsed.bits)
    grid = torch.randint(0, largest + 1, (4, 128)).float()
    grid[:, ::32], grid[:, 1::32] = 0, largest
    grid[:, 2::32], grid[:, 3::32] = 0, largest  # the ends twice: spikes do not shrink the range
    assert torch.equal(there_and_back(grid.flatten() * 0.25 - 1.5, wire), grid.flatten() * 0.25 - 1.5)


def test_padding_takes_no_part():
    """A lone large element of a last group: zeros behind it would widen its range."""
    layout = WireFormat.parse("int4").layout(4)
    message = torch.full((layout.nbytes,), 0xFF, dtype=torch.uint8)
    encode_message(torch.cat([torch.randn(128), torch.tensor([1000.0, 1001.0])]), layout, message)
    scale = message[layout.scales : layout.minimums].view(torch.bfloat16).float()
    minimum = message[layout.minimums : layout.spike_values].view(torch.bfloat16).float()
    assert minimum[1] == 1000.0 and scale[1] < 0.07
    assert (minimum[2:] == 0).all() and (scale[2:] == SMALLEST_SCALE).all()
    assert not message[64 + 2 : 4 * 64].any() and not message[layout.spike_values :].any()


@pytest.mark.parametrize("wire", FORMATS)
def test_what_is_not_finite_stays_visible(wire):
    parsed = WireFormat.parse(wire)
    bad = {10: float("nan"), 700: float("inf"), 1500: -float("inf"), 1800: 3.3e38}
    x = torch.randn(2000)
    for position, value in bad.items():
        x[position] = value
    x[1801] = -3.3e38  # the range overflows
    found = there_and_back(x, wire)
    groups = torch.arange(2000) // parsed.group_size
    hit = torch.isin(groups, torch.tensor([position // parsed.group_size for position in bad]))
    assert found[hit].isnan().all() and found[~hit].isfinite().all()


def test_spikes_are_the_first_smallest_and_largest():
    x = torch.randn(1, 128)
    x[0, 70], x[0, 90], x[0, 20], x[0, 5] = -50.0, -50.0, 80.0, 70.0
    valid = torch.ones(1, 128, dtype=torch.bool)
    codes, scale, minimum, spike, position = quantize_groups(x, valid, 4, True)
    assert spike.tolist() == [[-50.0, 80.0]] and position.tolist() == [[70, 20]]
    assert codes[0, 70] == codes[0, 20] == 0 and minimum.item() == -50.0 and abs(scale.item() - 8.0) < 0.1
    alone = quantize_groups(x, torch.arange(128)[None] == 3, 4, True)
    assert (
        alone[3].tolist() == [[x[0, 3].bfloat16().item()] * 2]
        and alone[4].tolist() == [[3, 3]]
        and alone[2].item() == 0
    )
