"""Machine code of the grouped kernel for GPUs that are not here: tensor cores, no spills, wide copies of weights."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from intscale_compile.kernels.grouped_tiles import choose_grouped_tile
from intscale_compile.kernels.tile import Tile
from intscale_compile.kernels.triton_gemm import schedule_flags
from intscale_compile.kernels.triton_grouped import row_tiles, w4a8_grouped_kernel
from tests.kernels.test_assembly import ACCUMULATE, FOLD, PER_CHANNEL, W8A8, check_loop, largest_first
from tests.support.sass import assemble

K, EXPERTS = 4096, 8
SIGNATURE = dict(xq_ptr="*i8", token_scale_ptr="*fp32", qdata_ptr="*u8", scale_ptr="*u8", row_scale_ptr="*fp32")
SIGNATURE |= dict(offsets_ptr="*i32", row_index_ptr="*i32", out_index_ptr="*i32", out_ptr="*bf16", rows="i32")
SIGNATURE |= dict(experts="i32", N="i32", K="i32", xq_stride="i32", qdata_stride="i32", scale_stride="i32")
ROWS = (2, 8, 32, 128, 256, 512, 1024, 4096, 32768)
FEATURES = (768, 4096, 28672)


def chosen_tiles(schedule, arch: int = 90) -> list[Tile]:
    """Every tile that ``choose_grouped_tile`` returns for a schedule."""
    tiles = {
        choose_grouped_tile(rows, experts, n, K, *schedule, arch)
        for rows, experts, n in itertools.product(ROWS, (8, 128), FEATURES)
    }
    return sorted(tiles, key=lambda tile: (tile.block_m, tile.block_n, tile.num_stages))


def compile_kernel(schedule, tile: Tile, target: GPUTarget, packing: str = "tiled", ptx: bool = True):
    group_size, scale_bits, weight_bits = schedule
    flags = schedule_flags(K, group_size, scale_bits, weight_bits, packing, tile)
    signature = SIGNATURE | ({"qdata_ptr": "*i8"} if weight_bits == 8 else {})
    constants = dict(
        zero_ptr=None, bias_ptr=None, DEQUANTIZE=True, HAS_BIAS=False, GATHER=True, SCATTER=True, PTX=ptx, GROUPS=16
    )
    aligned = [name for name in signature if name not in ("rows", "experts")]
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    return assemble(w4a8_grouped_kernel, signature, constants | flags, target, aligned=aligned, **options)


def compile_nvidia(schedule, tile: Tile, arch: int = 90):
    return compile_kernel(schedule, tile, GPUTarget("cuda", arch, 32))


SM90_CASES = largest_first((FOLD, ACCUMULATE), [(FOLD, chosen_tiles(FOLD)[0])], chosen_tiles)
SM90_CASES += [(W8A8, chosen_tiles(W8A8)[-1])]
OTHERS = (PER_CHANNEL, (32, 4, 4), (64, 8, 4), (256, 4, 4))
SM90_CASES += [pytest.param(s, chosen_tiles(s)[-1], marks=pytest.mark.slow) for s in OTHERS]


@pytest.mark.assembles(kernel=lambda schedule, tile: compile_nvidia(schedule, tile))
@pytest.mark.parametrize("schedule, tile", SM90_CASES, ids=lambda value: str(value).replace(" ", ""))
def test_hopper(schedule, tile, code):
    check_loop(code, ("IGMMA",))
    assert code.count("IMMA") == 0


@pytest.mark.assembles(
    kernel=lambda rows, schedule: compile_nvidia(
        schedule, choose_grouped_tile(rows, EXPERTS, 28672, K, *schedule, 80), 80
    )
)
@pytest.mark.parametrize(
    "schedule", [FOLD, pytest.param(ACCUMULATE, marks=pytest.mark.slow)], ids=["fold", "accumulate"]
)
@pytest.mark.parametrize("rows", [*(pytest.param(r, marks=pytest.mark.slow) for r in (2, 256, 512)), 8192])
def test_ampere(schedule, rows, code):
    check_loop(code, ("IMMA",), outside=8)  # under Triton 3.6, not in the loop


WIDE = chosen_tiles(FOLD)[0]


@pytest.mark.assembles(kernel=lambda: compile_nvidia(FOLD, WIDE))
def test_weights_arrive_in_wide_asynchronous_copies(code):
    """The expert's offset in the stack must not hide from the compiler that its weights are aligned."""
    wide = [i for i in code.k_loop() if i.base == "LDGSTS" and i.opcode.endswith(".128")]
    assert len(wide) >= WIDE.block_n * 64 // 16 // (32 * WIDE.num_warps)


@pytest.mark.parametrize(
    "schedule", [pytest.param(FOLD, marks=pytest.mark.slow), ACCUMULATE], ids=["fold", "accumulate"]
)
def test_amd(schedule):
    compiled = compile_kernel(schedule, Tile(64, 64, num_stages=2), GPUTarget("hip", "gfx942", 64), ptx=False)
    assert "v_mfma_i32" in compiled.asm["amdgcn"] and len(compiled.asm["hsaco"]) > 0


def test_grid_covers_every_routing():
    """The bound is reached, and never passed: all ways to give up to 9 rows to 3 experts and to none."""
    for rows, block in itertools.product(range(1, 10), (1, 2, 4)):
        needed = [
            sum(-(-count // block) for count in counts)
            for counts in itertools.product(range(rows + 1), repeat=4)
            if sum(counts) == rows
        ]
        assert max(needed) == row_tiles(rows, 3, block)


def test_decode_fills_the_gpu_and_prefill_uses_tall_tiles():
    for n in (28672, 14336):
        tile = choose_grouped_tile(2, 8, n, 4096, *FOLD)
        assert tile.block_m == 16 and 2 * -(-n // tile.block_n) >= 132
    assert choose_grouped_tile(8192, 8, 28672, 4096, *FOLD).block_m == 128
    assert choose_grouped_tile(8192, 8, 28672, 4096, *ACCUMULATE).block_m == 64
