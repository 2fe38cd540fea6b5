"""The Gluon kernels assembled for sm_90 without a GPU: tensor cores, no local memory in the K loop, no serialization.

Every shipped tile and every one that a rule can take, under whichever Triton is installed, if it is one that the kernels were
checked with. One tile for each path through the code runs always, the others with the slow tests. ``.ci/run`` repeats this
file under the oldest and the newest Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

triton = pytest.importorskip("triton")
from intscale_compile.format import pack_block  # noqa: E402
from intscale_compile.kernels.gluon_launch import REGISTERS, TRITON_RELEASES, loop_body  # noqa: E402
from intscale_compile.kernels.gluon_tiles import (  # noqa: E402
    SCHEDULES,
    choose_gated_tile,
    choose_gluon_tile,
    costed_tile,
    deepest,
    fits_resident,
    for_output,
    gated_tile,
    illegal,
    scale_tiles,
    scales_in_block,
    shared_bytes,
)
from intscale_compile.kernels.tile import Tile  # noqa: E402
from intscale_compile.kernels.tile_costs import COSTS  # noqa: E402
from intscale_compile.kernels.tile_tables import SHIPPED, active_tiles  # noqa: E402
from tests.support.gluon import POINTERS, RELEASE, check, descriptor  # noqa: E402

pytestmark = pytest.mark.skipif(RELEASE not in TRITON_RELEASES, reason=f"Gluon of Triton {triton.__version__}")
H100 = "NVIDIA H100 80GB HBM3"
SHORT_K = 1536  # 12 blocks: bodies of 4, half as long as those of 4096, for tests of what is not the loop


def distinct_tiles() -> list[tuple[str, Tile, int]]:
    """Every shipped tile once, with one K that it is shipped for."""
    found: dict[tuple[str, Tile], int] = {}
    for key, tile in active_tiles(H100):
        if tile.kernel != "triton":
            found.setdefault((key.schedule, tile), key.k)
    return [(schedule, tile, k) for (schedule, tile), k in found.items()]


def quick_first(
    cases: Iterable[tuple], path: Callable[..., Any], quick: Callable[..., bool] = lambda *case: True
) -> list:
    """``cases`` as parameters of a test: the first of each ``path`` through the code, if ``quick``, the others slow."""
    seen: set = set()
    parameters = []
    for case in cases if RELEASE in TRITON_RELEASES else ():
        marks = () if path(*case) not in seen and quick(*case) else pytest.mark.slow
        seen.add(path(*case))
        parameters.append(pytest.param(*case, marks=marks))
    return parameters


def path_of(schedule: str, tile: Tile, *_: Any) -> tuple:
    """What decides which code of the kernels a tile takes."""
    return schedule, tile.kernel, tile.block_n == 64, tile.split_k > 1


def compile_tile(
    schedule: str,
    tile: Tile,
    k: int,
    gated: str = "none",
    residual: bool = False,
    out: str = "bf16",
    group_size: int = 128,
):
    """Compile one kernel for sm_90 and return Triton's compiled object; ``out="i32"`` is the accumulator itself."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from intscale_compile.kernels import gluon_cooperative, gluon_decode, gluon_gemm

    blocks, scale, int8 = k // 128, "fp32" if schedule == "float" else "u8", schedule == "int8"
    pack = pack_block(group_size)
    schedule = "none" if int8 else schedule
    constants = dict(
        BLOCKS=blocks, GROUP_SIZE=group_size, SCALES=schedule, DEQUANTIZE=out != "i32", HAS_BIAS=False,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages, OVERLAP=True, bias_ptr=None,
    )  # fmt: skip
    signature = {**POINTERS, "out_ptr": f"*{out}", "scale_ptr": f"*{scale}", "M": "i32", "N": "i32"}
    options: dict = dict(num_warps=4 if tile.kernel == "cooperative" else tile.num_warps)
    if tile.kernel == "decode":
        fn, depth = gluon_decode.gemm_decode, 4 * tile.steps
        shapes = ([depth, tile.block_m, 64], [depth, tile.block_n, pack // 2], [depth, tile.block_n])
        resident = fits_resident(tile, schedule, blocks, scales_in_block(group_size))
        constants.update(STEPS=tile.steps, RESIDENT=resident)
        constants["SCALES"] = "accumulate" if schedule == "fold" else schedule
    else:
        kernels = {"pipelined": gluon_gemm.gemm_pipelined, "specialized": gluon_gemm.gemm_specialized}
        fn = kernels.get(tile.kernel, gluon_cooperative.gemm_cooperative)
        scales = [scale_tiles(tile), 1, 64] if gated == "none" else [2, tile.block_n // 128, 1, 64]
        rows = 8 if tile.kernel == "cooperative" and gated != "none" else 64
        shapes = ([tile.block_m // 2, 128], [rows, 128 if int8 else pack // 2], scales)
        groups = scales_in_block(group_size)
        unroll, ahead = loop_body(tile, schedule, int8, blocks, groups, ahead=gated == "none")
        constants.update(
            GROUP_N=tile.group_n, SPLIT_K=tile.split_k, UNROLL=unroll, INT8=int8, GATED=gated, HAS_RESIDUAL=residual
        )
        if tile.kernel == "cooperative":
            constants.update(AHEAD=ahead, TMA_STORE=out == "bf16", out_desc=None, residual_desc=None)
            for name in ("out_desc", "residual_desc")[: 1 + residual] if constants["TMA_STORE"] else ():
                del constants[name]
                signature[name] = descriptor([tile.block_m // 2, 64 if gated == "none" else 32], out)
        if residual:
            signature["residual_ptr"] = f"*{out}"
        else:
            constants["residual_ptr"] = None
        if tile.split_k > 1:
            signature.update(partial_ptr="*fp32" if schedule == "float" else "*i32", counter_ptr="*i32")
        else:
            constants.update(partial_ptr=None, counter_ptr=None)
    if tile.kernel != "pipelined":
        options["maxnreg"] = REGISTERS[tile.num_warps, tile.programs_per_sm]
    signature["x_desc"] = descriptor(shapes[0], "i8", swizzled=pack == 128 or tile.kernel != "decode")
    signature["w_desc"] = descriptor(shapes[1], "i8")
    signature["s_desc"] = descriptor(shapes[2], scale, swizzled=False)
    names = fn.arg_names
    aligned = [i for i, name in enumerate(names) if signature.get(name, "")[:1] == "*" or name == "N"]
    source = GluonASTSource(
        fn,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_there_are_tables():
    assert list(SHIPPED.glob("*.json")) and distinct_tiles()


def test_the_rules_take_nothing_that_is_not_assembled_here():
    tested = {same_code(schedule, tile) for schedule, tile, _ in [*distinct_tiles(), *tiles_by_rule()]}
    assert not chosen(choose_gluon_tile, SCHEDULES) - tested
    gated = {(schedule, tile) for schedule, tile, *_ in gated_tiles()}
    assert not chosen(choose_gated_tile, ("fold", "accumulate", "none", "int8")) - gated


@pytest.mark.assembles(kernel=compile_tile)
@pytest.mark.parametrize("schedule,tile,k", quick_first(distinct_tiles(), path_of), ids=str)
def test_shipped_tiles_assemble_without_spills(schedule, tile, k, code):
    check(code, tile, schedule, spill_bytes=0)


def same_code(schedule: str, tile: Tile) -> tuple[str, Tile]:
    """A tile without what changes no instruction: how many tiles are visited together, and how many parts K has."""
    return schedule, dataclasses.replace(tile, group_n=8, split_k=min(tile.split_k, 2))


@functools.cache
def costed_tiles() -> list[tuple[str, Tile]]:
    """Every legal tile of a kind whose time can be predicted, but of the decode kernel: with K whole and in parts."""
    kinds = [kind for kind in COSTS if kind[0] != "decode"]
    cases = [
        (schedule, costed_tile(*kind, split, schedule)) for schedule in SCHEDULES for kind in kinds for split in (1, 2)
    ]
    return [
        (schedule, tile)
        for schedule, tile in cases
        if illegal(tile, schedule, 4096) is None
        and (tile.split_k == 1 or tile.kernel != "pipelined" and tile.programs_per_sm == 1)
    ]


def chosen(choose: Callable[..., Tile], schedules: Iterable[str]) -> set[tuple[str, Tile]]:
    """What the rules take for some problems, from one token to prefill."""
    tokens, features, k = (1, 9, 16, 17, 40, 64, 150, 300, 1024, 4096), (1024, 2560, 4096, 28672), (1024, 4096, 14336)
    problems = itertools.product(schedules, tokens, features, k)
    return {same_code(schedule, choose(*problem, schedule)) for schedule, *problem in problems}


def largest(kernel: str, schedule: str) -> Tile:
    tiles = [tile for name, tile in costed_tiles() if (name, tile.kernel, tile.split_k) == (schedule, kernel, 1)]
    return max(tiles, key=lambda tile: (tile.block_m * tile.block_n, tile.block_m))


def tiles_by_rule() -> list[tuple[str, Tile, int]]:
    """What the rules can take where no table holds a tile, once, and the largest with fewer blocks in the loop's body."""
    shipped = {(schedule, tile) for schedule, tile, _ in distinct_tiles()}
    decode = {case for case in chosen(choose_gluon_tile, SCHEDULES) if case[1].kernel == "decode"}
    cases = [(*case, 4096) for case in sorted({*costed_tiles(), *decode} - shipped, key=str)]
    kernels = ("specialized", "pipelined", "cooperative")
    for schedule, kernel, blocks in itertools.product(SCHEDULES, kernels, (30, 27)):
        int8 = schedule == "int8"
        tile = largest(kernel, schedule)
        bodies = [loop_body(tile, "none" if int8 else schedule, int8, n).unroll for n in (32, blocks)]
        if bodies[1] < bodies[0]:
            cases.append((schedule, tile, 128 * blocks))
    return cases


@pytest.mark.assembles(kernel=compile_tile)
@pytest.mark.parametrize(
    "schedule,tile,k",
    quick_first(
        tiles_by_rule(),
        lambda schedule, *_: schedule,
        lambda schedule, *_: schedule == "int8",  # "accumulate" with a gate, below
    ),
    ids=str,
)
def test_tiles_by_rule_assemble_without_spills(schedule, tile, k, code):
    check(code, tile, schedule, float_sums=schedule == "float")
    if tile.kernel == "cooperative":
        check_stores(code, tile)


def check_stores(code, tile: Tile) -> None:
    """The transposed results go through shared memory, and the copy from there is on its own."""
    assert code.count("STSM") >= tile.block_m * tile.block_n // (32 * 32) and code.count("UTMASTG")


def fine_tiles() -> list[tuple[str, Tile, int, dict]]:
    """Every kind of tile for groups of 32 and 64, squares of 128 first, then the largest; gated ones, and with a residual."""
    decode = {case for case in chosen(choose_gluon_tile, ("fold",)) if case[1].kernel == "decode"}
    whole = [(s, t) for s, t in {*costed_tiles(), *decode} if s in ("fold", "accumulate") and t.split_k == 1]
    whole.sort(
        key=lambda case: (
            (case[1].block_m, case[1].block_n) != (128, 128),
            -case[1].block_m * case[1].block_n,
            str(case),
        )
    )
    cases = [(s, t, group_size, {}) for group_size in (32, 64) for s, t in whole]
    wide = deepest(Tile(256, 128, 8, kernel="cooperative"), "fold")
    return cases + [("fold", wide, 32, {"gated": "silu"}), ("fold", wide, 32, {"residual": True})]


def compile_fine(schedule: str, tile: Tile, group_size: int, form: dict):
    """The tile as the launcher fits it to the scales of several groups in a stage."""
    return compile_tile(schedule, fine(schedule, tile, group_size), SHORT_K, group_size=group_size, **form)


def fine(schedule: str, tile: Tile, group_size: int) -> Tile:
    return for_output(tile, schedule, 2, scales_in_block(group_size))


@pytest.mark.assembles(kernel=compile_fine)
@pytest.mark.parametrize(
    "schedule,tile,group_size,form",
    quick_first(
        fine_tiles(),
        lambda schedule, tile, group_size, form: (schedule, tile.kernel),
        lambda schedule, tile, group_size, form: (
            (schedule, tile.kernel) in (("fold", "cooperative"), ("fold", "decode"))
        ),
    ),
    ids=str,
)
def test_groups_of_32_and_64_assemble(schedule, tile, group_size, form, code):
    """The products of a stage stay in flight together where scales are folded; else those of a group do.

    Groups of 32 with two sums keep up to eight words of a loop in local memory (Triton 3.9; three with 3.6).
    """
    apart = schedule == "accumulate" and tile.kernel != "decode"
    words = 8 if apart and group_size == 32 else 0
    check(code, fine(schedule, tile, group_size), schedule, summed=group_size // 32 if apart else 0, words=words)
    stages = fine(schedule, tile, group_size).num_stages
    assert stages >= 2 and (schedule != "fold" or stages >= tile.num_stages - 1)


def gated_tiles() -> list[tuple[str, Tile, int, str]]:
    """Every tile that a shipped one, or one by rule, becomes in a gated launch, once; the widest with each activation."""
    schedules = ("fold", "accumulate", "none", "int8")
    found = {same_code(s, gated_tile(tile, s)): k for s, tile, k in distinct_tiles() if tile.kernel != "decode"}
    for schedule, tile in costed_tiles():
        if schedule in schedules and gated_tile(tile, schedule) == tile:
            found.setdefault((schedule, tile), 4096)
    found["fold", deepest(Tile(128, 256, 8, kernel="specialized"), "fold")] = 4096
    cases = [(schedule, tile, k, "silu") for (schedule, tile), k in found.items()]
    wide = [case for case in cases if case[1].block_m == case[1].block_n == 128]
    return cases + [(*case[:3], activation) for case in wide for activation in ("gelu", "gelu_tanh")]


GATED_QUICK = (
    ("accumulate", "cooperative", 8, "silu"),
    ("fold", "specialized", 8, "silu"),
    ("fold", "pipelined", 4, "gelu_tanh"),
)


@pytest.mark.assembles(kernel=lambda schedule, tile, k, activation: compile_tile(schedule, tile, k, activation))
@pytest.mark.parametrize(
    "schedule,tile,k,activation",
    quick_first(
        gated_tiles(),
        lambda schedule, tile, k, activation: (schedule, tile.kernel, tile.num_warps, activation),
        lambda schedule, tile, k, activation: (schedule, tile.kernel, tile.num_warps, activation) in GATED_QUICK,
    ),
    ids=str,
)
def test_gated_tiles_assemble_without_spills(schedule, tile, k, activation, code):
    assert illegal(tile, schedule, k) is None
    check(code, tile)


def residual_tiles() -> list[tuple[str, Tile, int]]:
    """Tiles by rule for prefill, and one with parts of K."""
    found = {(s, choose_gluon_tile(m, 4096, 4096, s)) for s in ("fold", "accumulate") for m in (300, 2048)}
    return [(*case, 4096) for case in sorted(found, key=str)] + [
        ("fold", Tile(64, 128, 4, 4, kernel="specialized", split_k=2), 4096)
    ]


@pytest.mark.assembles(kernel=lambda schedule, tile, k: compile_tile(schedule, tile, k, residual=True))
@pytest.mark.parametrize(
    "schedule,tile,k",
    quick_first(residual_tiles(), lambda schedule, *_: schedule, lambda schedule, *_: schedule == "fold"),
    ids=str,
)
def test_residuals_assemble_without_spills(schedule, tile, k, code):
    """Read as wide as the output is written, or by the tensor memory accelerator."""
    check(code, tile, schedule)
    if tile.kernel == "cooperative":
        check_stores(code, tile)
        assert (
            f"memdesc<{tile.num_warps // 4}x1xi64" in code.asm["ttgir"]
        )  # each consumer waits at a barrier of its own
        assert code.count("UTMASTG") == 2 * tile.block_n // 64  # two halves of the tokens, by 64 columns
        assert not any(i.base == "LDG" and "U16" in i.opcode for i in code.instructions)
    else:
        assert any(i.base == "LDG" and ".128" in i.opcode for i in code.instructions)


def wide_outputs() -> list[tuple[str, Tile, int, str]]:
    """Every kind of tile with the fp32 output of an fp32 model, and with the accumulator itself."""
    kinds = {(s, t.kernel, t.block_m, t.block_n, t.programs_per_sm): t for s, t in costed_tiles() if t.split_k == 1}
    by_size = sorted(kinds.items(), key=lambda case: case[1].block_m * case[1].block_n)
    return [(key[0], tile, SHORT_K, out) for key, tile in by_size for out in ("fp32", "i32")]


@pytest.mark.assembles(
    kernel=lambda schedule, tile, k, out: compile_tile(schedule, for_output(tile, schedule, 4), k, out=out)
)
@pytest.mark.parametrize(
    "schedule,tile,k,out",
    quick_first(
        wide_outputs(),
        lambda schedule, tile, k, out: (tile.kernel, out),
        lambda schedule, tile, k, out: (tile.kernel, out) in (("cooperative", "fp32"), ("specialized", "i32")),
    ),
    ids=str,
)
def test_wide_outputs_fit_in_shared_memory(schedule, tile, k, out, code):
    """Their epilogue takes up to 32 KiB beside the ring, which tiles for 16-bit outputs do not leave."""
    tile = for_output(tile, schedule, 4)
    check(code, tile, schedule, float_sums=True)
    assert code.shared <= shared_bytes(tile, schedule, 4)
