"""Machine code of the plain-Triton gated kernel for GPUs that are not here: tensor cores, no spills, wide copies."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from intscale_compile.kernels.tile import Tile
from intscale_compile.kernels.tiles import choose_tile
from intscale_compile.kernels.triton_gated import w4a8_gated_kernel
from intscale_compile.kernels.triton_gemm import schedule_flags
from tests.kernels.test_assembly import ACCUMULATE, FOLD, PER_CHANNEL, SIGNATURE, W8A8, check_loop
from tests.support.sass import assemble

N, K = 28672, 4096


def compile_kernel(schedule, tile: Tile, target: GPUTarget, activation: str = "silu", ptx: bool = True):
    group_size, scale_bits, weight_bits = schedule
    flags = schedule_flags(K, group_size, scale_bits, weight_bits, "tiled", tile)
    signature = SIGNATURE | ({"qdata_ptr": "*i8"} if weight_bits == 8 else {})
    constants = dict(zero_ptr=None, bias_ptr=None, GATED=activation, HAS_BIAS=False, PTX=ptx, **flags)
    aligned = [name for name in signature if name != "M"]
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    return assemble(w4a8_gated_kernel, signature, constants, target, aligned=aligned, **options)


def compile_nvidia(schedule, m: int, arch: int = 90, activation: str = "silu"):
    return compile_kernel(schedule, choose_tile(m, N, K, *schedule, arch), GPUTarget("cuda", arch, 32), activation)


@pytest.mark.assembles(kernel=lambda schedule, m: compile_nvidia(schedule, m))
@pytest.mark.parametrize(
    "schedule,m",
    [
        *((FOLD, m) for m in (1, 4096)),
        (ACCUMULATE, 4096),
        *(pytest.param(s, m, marks=pytest.mark.slow) for s, m in ((FOLD, 64), (W8A8, 4096))),  # W8A8 with gelu, below
        *(pytest.param(s, m, marks=pytest.mark.slow) for s in (ACCUMULATE, W8A8) for m in (1, 64)),
        *(pytest.param(s, m, marks=pytest.mark.slow) for s in (PER_CHANNEL, (32, 4, 4)) for m in (1, 64, 4096)),
    ],
    ids=str,
)
def test_hopper(schedule, m, code):
    check_loop(code, ("IGMMA",))
    assert code.count("IMMA") == 0


@pytest.mark.assembles(kernel=lambda schedule, activation: compile_nvidia(schedule, 4096, activation=activation))
@pytest.mark.parametrize(
    "schedule,activation",
    [
        (W8A8, "gelu"),
        *(
            pytest.param(s, a, marks=pytest.mark.slow)
            for s, a in ((PER_CHANNEL, "gelu"), (FOLD, "gelu"), (FOLD, "gelu_tanh"))
        ),
    ],
    ids=str,
)
def test_other_activations(schedule, activation, code):
    check_loop(code, ("IGMMA",))


@pytest.mark.assembles(kernel=lambda arch, schedule, m: compile_nvidia(schedule, m, arch))
@pytest.mark.parametrize(
    "arch,schedule,m",
    [
        (80, FOLD, 4096),
        (100, ACCUMULATE, 4096),
        pytest.param(80, ACCUMULATE, 4096, marks=pytest.mark.slow),
        *(pytest.param(89, s, m, marks=pytest.mark.slow) for s in (FOLD, ACCUMULATE) for m in (64, 4096)),
        *(pytest.param(arch, s, 64, marks=pytest.mark.slow) for arch in (80, 100) for s in (FOLD, ACCUMULATE)),
        pytest.param(100, FOLD, 4096, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_nvidia(arch, schedule, m, code):
    loop = code.k_loop()
    assert any(code.count(opcode, loop) for opcode in ("UTCIMMA", "IMMA")), code.opcodes(loop)
    # ptxas keeps 128 registers on sm_80 and sm_89, for two programs on an SM, and moves two others around the loop.
    assert code.spill_bytes <= 8 and code.count("STL", loop) == code.count("LDL", loop) == 0


@pytest.mark.assembles(kernel=lambda: compile_nvidia(FOLD, 4096))
def test_weights_arrive_in_wide_asynchronous_copies(code):
    """Rows from two halves of the weight must not hide from the compiler that each row is aligned."""
    tile = choose_tile(4096, N, K, *FOLD)
    wide = [i for i in code.k_loop() if i.base == "LDGSTS" and i.opcode.endswith(".128")]
    assert len(wide) >= tile.block_n * 64 // 16 // (32 * tile.num_warps)


@pytest.mark.parametrize(
    "schedule", [pytest.param(FOLD, marks=pytest.mark.slow), ACCUMULATE], ids=["fold", "accumulate"]
)
def test_amd(schedule):
    compiled = compile_kernel(schedule, Tile(64, 64, num_stages=2), GPUTarget("hip", "gfx942", 64), ptx=False)
    assert "v_mfma_i32" in compiled.asm["amdgcn"] and len(compiled.asm["hsaco"]) > 0
