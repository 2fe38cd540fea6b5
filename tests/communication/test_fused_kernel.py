"""The all-reduce in one kernel: exact in the interpreter with a process per rank, and compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from intscale_compile.communication import code_words, word_kernels
from intscale_compile.communication.fused_kernel import (
    LARGE_CHUNK,
    MOST_PROGRAMS,
    PROGRAMS_PER_MULTIPROCESSOR,
    fused_all_reduce_kernel,
    gather_slots,
    schedule,
    workspace_bytes,
)
from intscale_compile.communication.message import WireFormat
from intscale_compile.communication.triton_kernels import ELEMENTS, WARPS
from tests.support import interpreter_works
from tests.support.interpreter import EXTENTS, assert_passed, results_of
from tests.support.sass import assemble, disassemble


@interpreter_works
@pytest.mark.parametrize("extent", EXTENTS)
def test_ranks_agree_with_the_reference(extent):
    assert_passed(results_of("_fused_main", "tests.communication", extent), "")


@pytest.mark.parametrize(
    ("arch", "ranks", "bits", "resident", "spill_bytes"),
    [(90, 2, 4, PROGRAMS_PER_MULTIPROCESSOR, 0), (80, 8, 6, PROGRAMS_PER_MULTIPROCESSOR - 1, 128)],
)
def test_resident_and_published_to_the_system(arch, ranks, bits, resident, spill_bytes):
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16", "own_ptr": "*u8", "peers_ptr": "*i64", "counts_ptr": "*i32"}
    aligned = ["elements", "length", "nbytes", "out_nbytes", "out_slots"]
    signature = pointers | dict.fromkeys((*aligned, "groups", "per_round"), "i32")
    constants = dict(BITS=bits, OUT_BITS=bits, HALF=64, SPIKES=False, GROUPS=LARGE_CHUNK // 128)
    constants |= dict(RANK=1, RANKS=ranks, PROGRAMS=MOST_PROGRAMS)
    options = dict(num_warps=WARPS, enable_fp_fusion=False, maxnreg=128)
    target = GPUTarget("cuda", arch, 32)
    compiled = assemble(fused_all_reduce_kernel, signature, constants, target, aligned=[*pointers, *aligned], **options)
    code = disassemble(compiled)
    assert code.spill_bytes <= spill_bytes
    assert code.registers * 32 * WARPS * resident <= 65536
    ptx = compiled.asm["ptx"]
    assert ptx.count("atom.global.sys.release.exch.b32") == 2, "all flags of a leg at once"
    assert "ld.volatile.global.b32" in ptx and "ld.global.cg" in ptx
    if arch == 90:
        assert "ld.global.b8" not in ptx and "st.global.b8" not in ptx


@pytest.mark.parametrize(("kernel", "ranks"), [("one_shot", 8), ("two_shot", 2), ("two_shot", 8)])
def test_words_need_no_flag(kernel, ranks):
    """Four words are one store and one load of sixteen bytes; nothing is published or awaited but the words."""
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16", "own_ptr": "*u8", "peers_ptr": "*i64", "counts_ptr": "*i32"}
    sizes = ("words",) if kernel == "one_shot" else ("words", "length")
    form = word_kernels.ONE_SHOT if kernel == "one_shot" else word_kernels.two_shot(ranks)
    constants = dict(LEGS=form.legs, RANK=1, RANKS=ranks, WORDS=word_kernels.WORDS, PROGRAMS=form.programs)
    signature, target = pointers | dict.fromkeys(sizes, "i32"), GPUTarget("cuda", 90, 32)
    options = dict(num_warps=word_kernels.WARPS, enable_fp_fusion=False)
    source = getattr(word_kernels, f"{kernel}_kernel")
    compiled = assemble(source, signature, constants, target, aligned=[*pointers, *sizes], **options)
    assert disassemble(compiled).spill_bytes == 0
    ptx, others = compiled.asm["ptx"], ranks - 1
    assert ptx.count("ld.volatile.global.v4.b32") == others * (1 if kernel == "one_shot" else 2)
    stores = others * (1 + 1) if kernel == "one_shot" else others * (1 + 2 + 1 + 1)
    assert ptx.count("st.global.v4.b32") == stores + 1, "sent, emptied, sums sent, received; the own sum"
    assert "fence" not in ptx and "atom" not in ptx


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_code_words_need_no_flag(ranks):
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16", "own_ptr": "*u8", "peers_ptr": "*i64", "counts_ptr": "*i32"}
    aligned = ["elements", "length"]
    signature = pointers | dict.fromkeys((*aligned, "groups", "begin", "programs"), "i32")
    constants, target = dict(RANK=1, RANKS=ranks, GROUPS=code_words.GROUPS), GPUTarget("cuda", 90, 32)
    options = dict(num_warps=code_words.WARPS, enable_fp_fusion=False)
    compiled = assemble(
        code_words.code_words_kernel, signature, constants, target, aligned=[*pointers, *aligned], **options
    )
    code = disassemble(compiled)
    assert code.spill_bytes <= 16 and code.registers <= 128, "Triton 3.9 spills 8 bytes for four ranks, 3.6 none"
    ptx, others = compiled.asm["ptx"], ranks - 1
    words = code_words.GROUPS * 32 // 2 // (32 * code_words.WARPS)  # pairs of words of a thread
    assert ptx.count("ld.volatile.global.v2.b32") == 2 * others * words, "two legs"
    assert "fence" not in ptx and "atom" not in ptx


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_launches_of_code_words_cover_their_groups(ranks):
    for elements in (1, 128 * ranks, 1 << 20, (1 << 20) + 1, 40_000_001, 32 << 20):
        form = code_words.code_form(elements, ranks)
        groups = WireFormat(8).slice_elements(elements, ranks) // 128
        launches = [form.launched(groups - begin) for begin in range(0, groups, form.groups)]
        assert sum(launches) * code_words.GROUPS >= groups > (sum(launches) - 1) * code_words.GROUPS
        assert len(launches) <= -(-elements // (32 << 20)) and max(launches) <= form.programs
    assert code_words.code_form(1, ranks).workspace_bytes < 8 << 20 and form.workspace_bytes < 256 << 20


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_launches_of_words_cover_their_elements(ranks):
    for form in (word_kernels.ONE_SHOT, word_kernels.two_shot(ranks)):
        for elements in (2, 30, 34, 8192 * ranks + 2, form.elements - 2, form.elements):
            assert form.slices * form.slice_words(elements) * 2 >= elements and form.slice_words(elements) % 16 == 0
            assert 1 <= form.launched(elements) <= form.programs
        assert form.launched(form.elements) == form.programs and form.workspace_bytes(ranks) <= 64 << 20


@pytest.mark.parametrize("ranks,bits,most", [(2, 8, 4), (2, 16, 4), (4, 4, 4), (4, 8, 2), (8, 16, 1)])
def test_schedule_covers_all_chunks_with_few_flags(ranks, bits, most):
    for length in (32, 132 * ELEMENTS, 132 * ELEMENTS + 1, 528 * LARGE_CHUNK, 528 * LARGE_CHUNK + 1, 1 << 30):
        plan = schedule(length, 132, ranks, bits)
        chunks = -(-length // plan.chunk)
        assert plan.chunk == (ELEMENTS if length <= 132 * ELEMENTS else LARGE_CHUNK)
        most = 1 if ranks >= 4 and bits == 8 and length > 4 << 20 else most
        assert 1 <= plan.programs <= min(528, chunks) and 1 <= plan.per_round <= most
        rounds = -(-chunks // (plan.programs * plan.per_round))
        assert (rounds - 1) * plan.programs * plan.per_round < chunks
        assert rounds == 1 or plan.per_round == most
    assert schedule(LARGE_CHUNK * 5000, 1000, ranks, bits).programs == MOST_PROGRAMS


@pytest.mark.parametrize("wire", ["int8", "int6", "int4-spikes"])
def test_the_legs_of_all_launches_on_a_workspace_lie_apart(wire):
    form, ranks = WireFormat.parse(wire), 3
    needed = {n: workspace_bytes(ranks, form.layout(n), form.layout(n)) for n in (1, 7, 100, 5000)}
    space = max(needed.values())
    boundary = gather_slots(ranks, space)
    for groups, smaller in needed.items():
        assert 8 * ranks * MOST_PROGRAMS + ranks * form.layout(groups).nbytes <= boundary
        assert boundary + ranks * form.layout(groups).nbytes <= space
        assert boundary % 16 == 0 and gather_slots(ranks, smaller) <= boundary
