"""The all-reduce in one kernel: exact in the interpreter with a process per rank, and compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from intscale_compile.communication.fused_kernel import MOST_PROGRAMS, fused_all_reduce_kernel
from intscale_compile.communication.symmetric import PROGRAMS_PER_MULTIPROCESSOR
from intscale_compile.communication.triton_kernels import ELEMENTS, WARPS
from tests.support import interpreter_works
from tests.support.interpreter import assert_passed, results_of
from tests.support.sass import assemble, disassemble


@interpreter_works
def test_ranks_agree_with_the_reference():
    assert_passed(results_of("_fused_main", "tests.communication"), "")


@pytest.mark.parametrize(("arch", "ranks", "bits", "out_bits"), [(80, 8, 5, 5), (90, 2, 4, 8)])
def test_resident_and_published_to_the_system(arch, ranks, bits, out_bits, tmp_path):
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16", "own_ptr": "*u8", "peers_ptr": "*i64", "counts_ptr": "*i32"}
    signature = pointers | dict.fromkeys(("elements", "length", "groups", "nbytes", "out_nbytes"), "i32")
    constants = dict(BITS=bits, OUT_BITS=out_bits, HALF=64, SPIKES=False, GROUPS=ELEMENTS // 128)
    constants |= dict(RANK=1, RANKS=ranks, PROGRAMS=MOST_PROGRAMS)
    aligned = [*pointers, "elements", "length", "nbytes", "out_nbytes"]
    options = dict(num_warps=WARPS, enable_fp_fusion=False)
    target = GPUTarget("cuda", arch, 32)
    compiled = assemble(fused_all_reduce_kernel, signature, constants, target, aligned=aligned, **options)
    code = disassemble(compiled, tmp_path)
    assert code.spill_bytes <= (16 if bits == 5 else 0)  # 5 bits are rarely asked for
    assert code.registers * 32 * WARPS * PROGRAMS_PER_MULTIPROCESSOR <= 65536
    ptx = compiled.asm["ptx"]
    assert "sys.release" in ptx and "sys.acquire" in ptx
    if bits == 4:  # the plane of high bits of 5-bit codes is written byte by byte
        assert "ld.global.b8" not in ptx and "st.global.b8" not in ptx
