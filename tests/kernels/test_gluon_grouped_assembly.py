"""The grouped Gluon kernels (experts) assembled for sm_90 without a GPU, as ``test_gluon_assembly`` does for the dense ones."""

from __future__ import annotations

import itertools

import pytest

triton = pytest.importorskip("triton")
from intscale_compile.format import pack_block  # noqa: E402
from intscale_compile.kernels.gluon_launch import REGISTERS, TRITON_RELEASES, loop_body  # noqa: E402
from intscale_compile.kernels.gluon_tiles import deepest, for_output, scales_in_block  # noqa: E402
from intscale_compile.kernels.grouped_tiles import choose_grouped_tile  # noqa: E402
from intscale_compile.kernels.tile import Tile  # noqa: E402
from tests.support.gluon import POINTERS, RELEASE, check, descriptor  # noqa: E402

pytestmark = pytest.mark.skipif(RELEASE not in TRITON_RELEASES, reason=f"Gluon of Triton {triton.__version__}")


def compile_grouped(
    schedule: str, tile: Tile, k: int, groups: int, out: str = "bf16", indices: bool = True, group_size: int = 128
):
    """Compile one kernel for sm_90; ``out="i32"`` is the accumulator itself, ``"fp32"`` has a bias."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from intscale_compile.kernels import gluon_grouped

    blocks, int8, decode = k // 128, schedule == "int8", tile.kernel == "decode"
    scales = "none" if int8 else "accumulate" if decode and schedule == "fold" else schedule
    signature = {"out_ptr": f"*{out}", "scale_ptr": "*u8", "offsets_ptr": "*i32"}
    signature |= dict.fromkeys(("rows", "experts", "N", "row_tiles"), "i32")
    constants = dict(
        BLOCKS=blocks, GROUP_SIZE=group_size, SCALES=scales, DEQUANTIZE=out != "i32", HAS_BIAS=out == "fp32", GROUPS=groups,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages, OVERLAP=True,
    )  # fmt: skip
    for name, there in (
        ("row_scale_ptr", out != "i32"), ("token_scale_ptr", out != "i32"), ("bias_ptr", out == "fp32"),
        ("row_index_ptr", indices), ("out_index_ptr", indices),
    ):  # fmt: skip
        if there:
            signature[name] = POINTERS.get(name, "*fp32" if name == "bias_ptr" else "*i32")
        else:
            constants[name] = None
    pack = pack_block(group_size)
    if decode:
        fn, depth, constants["STEPS"] = gluon_grouped.grouped_decode, 4 * tile.steps, tile.steps
        shapes = ([depth, tile.block_m, 64], [depth, tile.block_n, pack // 2], [depth, tile.block_n])
    else:
        fn = gluon_grouped.grouped_cooperative
        shapes = ([tile.block_m // 2, 128], [64, 128 if int8 else pack // 2], [tile.block_n // 64, 1, 64])
        unroll = loop_body(tile, scales, int8, blocks, scales_in_block(group_size), ahead=False).unroll
        constants.update(GROUP_N=tile.group_n, UNROLL=unroll, INT8=int8)
    signature["x_desc"] = descriptor(shapes[0], "i8", swizzled=pack == 128 or tile.kernel != "decode")
    signature["w_desc"] = descriptor(shapes[1], "i8")
    signature["s_desc"] = descriptor(shapes[2], "u8", swizzled=False)
    names = fn.arg_names
    aligned = [i for i, name in enumerate(names) if signature.get(name, "")[:1] == "*" or name == "N"]
    source = GluonASTSource(
        fn,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = dict(num_warps=tile.num_warps if decode else 4, maxnreg=REGISTERS[tile.num_warps, tile.programs_per_sm])
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


SCHEDULES = {"fold": (128, 4, 4), "accumulate": (128, 8, 4), "none": (-1, 1, 4), "int8": (-1, 1, 8)}


def chosen(schedule: str) -> set[Tile]:
    """What the rules take for some problems, from one token to prefill."""
    rows, experts = (1, 8, 32, 128, 512, 4096, 16384), (8, 128)
    features = ((28672, 4096), (4096, 14336), (1536, 2048), (2048, 768))
    problems = itertools.product(rows, experts, features)
    named = (
        "accumulate" if schedule == "accumulate" else "fold"
    )  # per channel and in 8 bits the same tiles, not chosen yet
    tiles = {choose_grouped_tile(r, e, n, k, *SCHEDULES[named], gluon=True) for r, e, (n, k) in problems}
    gluon = {tile for tile in tiles if tile.kernel != "triton" and not (schedule == "int8" and tile.kernel == "decode")}
    return {deepest(tile, schedule, most=4 if tile.kernel == "decode" else 8) for tile in gluon}


def cases() -> list:
    """Every tile that the rules take, for few and for many experts, and other outputs; one of each kind is quick.

    The sums themselves (``i32``), which only tests and sweeps ask for, with few experts.
    """
    found = [
        (schedule, tile, groups, out)
        for schedule in SCHEDULES
        for tile in sorted(chosen(schedule), key=str)
        for groups, out in ((32, "bf16"), (256, "bf16"), (512, "bf16"), (32, "fp32"), (256, "fp32"), (32, "i32"))
    ]
    quick = {
        ("fold", "decode", "bf16"): 256,
        ("fold", "cooperative", "fp32"): 256,
    }  # how scales are applied is in functions of the dense kernels, which are assembled with sums apart
    parameters = []
    for schedule, tile, groups, out in found:
        if quick.get((schedule, tile.kernel, out)) == groups:
            del quick[schedule, tile.kernel, out]
            parameters.append(pytest.param(schedule, tile, groups, out))
        else:
            parameters.append(pytest.param(schedule, tile, groups, out, marks=pytest.mark.slow))
    return parameters


def test_the_rules_follow_what_was_measured():
    """Rows and shapes of the sweep on an H100: the kernel that was the fastest, or within 4 % of it."""
    for experts, n, k, rows, kind in MEASURED:
        tile = choose_grouped_tile(rows, experts, n, k, *SCHEDULES["fold"], gluon=True)
        assert (tile.kernel, tile.block_m) == kind, (n, k, rows)
    assert choose_grouped_tile(4096, 8, 28672, 4096, 128, 4, 4).kernel == "triton"


@pytest.mark.parametrize("form", [(-1, 1, 4), (-1, 1, 8), (256, 4, 4)], ids=str)
def test_formats_that_no_gpu_has_run_are_not_chosen(form):
    for experts, n, k, rows, _ in MEASURED:
        assert choose_grouped_tile(rows, experts, n, k, *form, gluon=True).kernel == "triton"


MEASURED = [
    (8, 28672, 4096, 2, ("triton", 16)),
    (8, 28672, 4096, 128, ("cooperative", 64)),
    (8, 28672, 4096, 512, ("cooperative", 128)),
    (8, 28672, 4096, 4096, ("cooperative", 128)),
    (8, 4096, 14336, 2, ("decode", 8)),
    (8, 4096, 14336, 32, ("decode", 8)),
    (8, 4096, 14336, 512, ("cooperative", 128)),
    (128, 1536, 2048, 8, ("triton", 16)),
    (128, 1536, 2048, 2048, ("triton", 16)),
    (128, 1536, 2048, 16384, ("cooperative", 128)),
    (128, 2048, 768, 16384, ("cooperative", 64)),
]


def for_its_output(schedule: str, tile: Tile, out: str) -> Tile:
    return for_output(tile, schedule, 2 if out == "bf16" else 4)


def compile_case(schedule: str, tile: Tile, groups: int, out: str):
    return compile_grouped(schedule, for_its_output(schedule, tile, out), 4096, groups, out, indices=out != "i32")


@pytest.mark.assembles(kernel=compile_case)
@pytest.mark.parametrize("schedule,tile,groups,out", cases(), ids=str)
def test_grouped_tiles_assemble_without_spills(schedule, tile, groups, out, code):
    check(code, for_its_output(schedule, tile, out))
