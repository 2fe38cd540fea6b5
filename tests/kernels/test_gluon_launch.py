"""When the Gluon kernels are used, decided without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from intscale_compile.kernels import gluon_launch  # noqa: E402
from intscale_compile.kernels.tile import Tile  # noqa: E402
from intscale_compile.kernels.triton_gemm import gluon_obstacle, pick_tile  # noqa: E402
from intscale_compile.reasons import log_once  # noqa: E402


@pytest.mark.parametrize("capability", [0, 80, 89, 100, 120])
def test_only_hopper(capability):
    assert str(capability) in gluon_launch.missing_feature(capability)


def test_an_unknown_triton_runs_plain_kernels_and_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(gluon_launch.triton, "__version__", "3.99.1")
    gluon_launch.missing_feature.cache_clear()
    log_once.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="intscale_compile"):
            reason = gluon_launch.missing_feature(90)
            assert gluon_launch.missing_feature(90) == reason
            gluon_launch.missing_feature.cache_clear()
            gluon_launch.missing_feature(90)
    finally:
        gluon_launch.missing_feature.cache_clear()
    assert reason == "the Gluon kernels were checked with Triton 3.6, 3.7, 3.8, 3.9, not with 3.99.1"
    assert [r.getMessage() for r in caplog.records] == [f"plain Triton instead of Gluon: {reason}"]


@pytest.mark.parametrize(
    "change,part",
    [
        ({}, None),
        ({"group_size": 256}, None),
        ({"group_size": -1}, None),
        ({"group_size": -1, "weight_bits": 8}, None),
        ({"scale_bits": 8}, None),
        ({"packing": "plain"}, "tiled packing"),
        ({"in_features": 4100}, "4100 input features"),
        ({"group_size": 64}, None),
        ({"group_size": 32}, None),
        ({"group_size": 32, "in_features": 576}, "576 input features"),
        ({"group_size": 256, "in_features": 4224}, "group size 256"),
        ({"group_size": -1, "in_features": 1 << 18}, "per channel"),
        ({"scale_bits": 11}, "11 bits"),
    ],
)
def test_formats(change, part):
    weight = dict(in_features=4096, group_size=128, weight_bits=4, scale_bits=4, packing="tiled") | change
    reason = gluon_launch.unsupported_format(**weight)
    assert reason is None if part is None else part in reason


def test_per_channel_limit_is_the_overflow_of_codes_16_times_too_large():
    assert (
        16 * 8 * 127 * gluon_launch.MAX_PER_CHANNEL_K
        < 2**31
        <= 16 * 8 * 127 * (gluon_launch.MAX_PER_CHANNEL_K * 9 // 8)
    )


@pytest.mark.parametrize(
    "weight,decode,float_scale,schedule",
    [
        ((128, 4, 4), False, False, "fold"),
        ((128, 4, 4), True, False, "accumulate"),
        ((128, 8, 4), False, False, "accumulate"),
        ((-1, 4, 4), False, False, "none"),
        ((-1, 1, 8), False, True, "none"),
        ((128, 4, 4), True, True, "float"),
    ],
)
def test_schedules(weight, decode, float_scale, schedule):
    assert gluon_launch.scale_schedule(*weight, decode, float_scale) == schedule


def test_tensor_memory_accelerator_wants_16_bytes():
    x = torch.zeros(4, 64, dtype=torch.int8)
    assert gluon_launch.addressable(x) == (x.data_ptr() % 16 == 0)
    assert not gluon_launch.addressable(x[:, 8:]) and not gluon_launch.addressable(torch.zeros(4, 40, dtype=torch.int8))


def test_a_cpu_has_an_obstacle_and_a_plain_tile():
    device = torch.device("cpu")
    assert gluon_obstacle(4096, 128, 4, 4, "tiled", device)
    assert pick_tile(1, 4096, 4096, 128, 4, 4, device, False).kernel == "triton"


@pytest.mark.parametrize(
    "tile,scales,int8,blocks,groups,body",
    [
        ((128, 128, 8), "fold", False, 32, 1, (8, True)),
        ((128, 256, 8), "none", False, 32, 1, (8, True)),
        ((128, 128, 8), "fold", False, 30, 4, (2, True)),  # groups of 32
        ((128, 128, 8), "fold", False, 27, 1, (1, False)),
        ((128, 192, 12), "fold", False, 32, 1, (4, False)),  # a third consumer
        ((256, 128, 8), "fold", False, 32, 1, (4, False)),
        ((128, 128, 8), "accumulate", False, 32, 1, (2, False)),
        ((128, 128, 8), "none", True, 32, 1, (1, False)),  # 8-bit weights
    ],
)
def test_two_consumers_of_128_tokens_with_one_sum_read_ahead(tile, scales, int8, blocks, groups, body):
    cooperative = Tile(*tile, kernel="cooperative")
    assert gluon_launch.loop_body(cooperative, scales, int8, blocks, groups) == body


@pytest.mark.parametrize(
    "blocks,split_k,unroll", [(32, 2, 8), (112, 2, 8), (112, 4, 4), (40, 2, 4), (8, 2, 4), (32, 8, 4)]
)
def test_long_bodies_do_not_make_parts_of_k_unequal(blocks, split_k, unroll):
    tile = Tile(128, 128, 8, kernel="cooperative", split_k=split_k)
    assert gluon_launch.loop_body(tile, "fold", False, blocks) == (unroll, True)
