"""benchmarks/two_bit_messages.py, eight_bit_groups.py and kv_cache.py: what they simulate, exactly."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from intscale_compile.communication import WireFormat, simulate_all_reduce
from tests.support.benchmarks import load

bench = load(("two_bit_messages", "eight_bit_groups", "kv_cache"))


@pytest.mark.parametrize("text, wire", [("8", "int8"), ("4s", "int4-spikes")])
def test_messages_are_those_of_the_wire_formats(text, wire):
    torch.manual_seed(0)
    parts = [torch.randn(1000) * torch.randn(1000).exp() for _ in range(2)]
    found = bench.two_bit_messages.Message.parse(text).all_reduce(parts)
    assert torch.equal(found, simulate_all_reduce(parts, WireFormat.parse(wire)))


def test_a_message_of_two_bits():
    message = bench.two_bit_messages.Message.parse("2s/32")
    assert message.bits_sent == 4.5 and bench.two_bit_messages.Message.parse("3").bits_sent == 3.25
    x = torch.arange(32.0)
    found = message.received(x)
    assert (found[0], found[31]) == (0.0, 31.0) and len(found.unique()) == 6  # both ends, and four levels between
    with pytest.raises(argparse.ArgumentTypeError, match="'9' is no format"):
        bench.two_bit_messages.Message.parse("9")


@pytest.mark.parametrize("group, integer", [(None, False), (128, False), (128, True)])
def test_eight_bit_weights(group, integer):
    torch.manual_seed(0)
    weight = torch.randn(8, 300) * torch.randn(8, 300).exp()
    codes, scale, row = bench.eight_bit_groups.rounded(weight, group, integer)
    wide = (scale * row).repeat_interleave(codes.shape[1] // scale.shape[1], 1)[:, :300]
    assert ((codes[:, :300] * wide - weight).abs() <= 0.5001 * wide).all() and int(codes.abs().max()) == 127
    assert not integer or bool((scale == scale.round()).all() and scale.min() >= 1 and scale.max() == 15)


def test_paired_change():
    assert bench.kv_cache.paired([1.1, 2.3], [1.0, 2.0]) == f"{100 * math.expm1(0.2):+.3f} ± 10.000 %"
