"""Which kernel and tile a gated linear gets, and that Inductor leaves the op whole; decided without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from intscale_compile import format as fmt
from intscale_compile import ops
from intscale_compile.compile.inductor_settings import inductor_defaults
from intscale_compile.kernels import triton_gated
from intscale_compile.kernels.gluon_tiles import choose_gluon_tile, gated_tile, illegal
from intscale_compile.kernels.tile import Tile
from intscale_compile.kernels.tile_tables import active_tiles
from intscale_compile.kernels.tiles import choose_tile
from intscale_compile.kernels.triton_gated import gated_obstacle, pick_gated_tile
from tests.support import fake_cuda

pytestmark = pytest.mark.generated

H100 = "NVIDIA H100 80GB HBM3"
SHAPES = ((2048, 1024), (28672, 4096), (22016, 4096), (57344, 8192))
HIDDEN, INTERMEDIATE = 4096, 11008


@pytest.mark.parametrize("schedule", ["fold", "accumulate", "none", "int8"])
def test_tiles_by_rule_are_legal(schedule):
    for (n, k), m in itertools.product(SHAPES, (17, 33, 65, 129, 256, 300, 1024, 4096, 16384)):
        tile = gated_tile(choose_gluon_tile(m, n, k, schedule), schedule)
        assert tile.block_n >= 128 and tile.kernel != "decode"
        assert illegal(tile, schedule, k) is None, (m, n, k, tile)


def test_shipped_tiles_become_legal_ones():
    for key, tile in active_tiles(H100):
        if tile.kernel != "triton":
            gated = gated_tile(tile, key.schedule)
            assert illegal(gated, key.schedule, key.k) is None, tile
            assert gated is tile or tile.kernel == "decode" or tile.block_n == 64


@pytest.mark.parametrize(
    "m,kernels", [(1, {"triton"}), (16, {"triton"}), (17, {"specialized"}), (2048, {"cooperative"})]
)
def test_few_tokens_run_in_plain_triton(m, kernels, monkeypatch):
    """The Gluon kernel for up to 16 tokens has no gated form."""

    def pick(m, n, k, group_size, scale_bits, weight_bits, device, gluon, in_parts):
        return choose_gluon_tile(m, n, k, "fold") if gluon else Tile(16, 128)

    monkeypatch.setattr(triton_gated, "pick_tile", pick)
    tile = pick_gated_tile(m, 28672, 4096, 128, 4, 4, torch.device("cpu"), True)
    assert tile.kernel in kernels and tile.block_n >= 128
    wide = pick_gated_tile(m, 28672, 4096, 128, 4, 4, torch.device("cpu"), True, out_bytes=4)
    assert wide.kernel == ("specialized" if tile.kernel == "cooperative" else tile.kernel)


@pytest.mark.parametrize("n", [1024, 4096, 28672])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_the_gated_kernel_is_given_no_parts_of_k(n, group_size):
    """It has none: a tile with parts would leave a narrow layer with a few programs."""
    for m in (1, 16, 64):
        for gluon in (False, True) if m <= 16 else (False,):
            tile = pick_gated_tile(m, n, 4096, group_size, 4, 4, torch.device("cpu"), gluon)
            assert tile == choose_tile(m, n, 4096, group_size, 4, 4, 0), (m, gluon)


def test_obstacles(monkeypatch):
    monkeypatch.setattr(triton_gated, "gluon_obstacle", lambda *_: None)
    form = (4096, 128, 4, 4, "tiled", torch.device("cpu"))
    assert gated_obstacle(28672, *form) is None
    assert "96 gated output features" in gated_obstacle(192, *form)


def gated_mlp(x, gate_up_q, gate_up_s, gate_up_r, down_q, down_s, down_r):
    """Gated projections, quantization, down projection, residual."""
    arguments = (128, 4, "tiled", x.dtype, ops.KERNEL_ABI)
    quantize, intscale = torch.ops.intscale.quantize_per_token, torch.ops.intscale
    z = intscale.w4a8_gated_linear(
        *quantize(x), gate_up_q, gate_up_s, gate_up_r, None, "silu", 2 * INTERMEDIATE, *arguments, True
    )
    return x + intscale.w4a8_linear(*quantize(z), down_q, down_s, down_r, None, HIDDEN, *arguments)


def weight_shapes(n: int, k: int):
    rows, groups = fmt.padded_out_features(n), fmt.num_groups(k, 128)
    return [((rows, k // 2), torch.uint8), ((rows, groups), torch.uint8), ((n, 1), torch.float32)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_calls_the_op(dynamic):
    """Three kernels beside it: a quantization on either side, and the down projection with its residual."""
    ops.register_inductor()
    shapes = [((2048, HIDDEN), torch.bfloat16), *weight_shapes(2 * INTERMEDIATE, HIDDEN)]
    shapes += weight_shapes(HIDDEN, INTERMEDIATE)
    code = fake_cuda.generate(gated_mlp, *fake_cuda.fake_inputs(shapes, dynamic), **inductor_defaults(()))
    assert code.count("torch.ops.intscale.w4a8_gated_linear.default(") == 1
    assert len(fake_cuda.triton_sources(code)) == 3
