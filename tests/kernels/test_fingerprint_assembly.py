"""The kernel that compares samples of weights compiles for GPUs that are not here, without spills."""

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from intscale_compile.kernels.triton_fingerprint import PIECE_WORDS, SAMPLED_WORDS, fingerprint_kernel
from tests.support.sass import assemble

SIGNATURE = {"table_ptr": "*i64", "flags_ptr": "*i32"}


@pytest.mark.parametrize("compare", [True, False])
@pytest.mark.parametrize("target", [GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)], ids=["sm_80", "gfx942"])
def test_it_compiles(target, compare):
    constants = dict(COMPARE=compare, WORDS=SAMPLED_WORDS, PIECE=PIECE_WORDS)
    compiled = assemble(fingerprint_kernel, SIGNATURE, constants, target, num_warps=4)
    text = compiled.asm["ptx"] if target.backend == "cuda" else compiled.asm["amdgcn"]
    assert ("ld.global" if target.backend == "cuda" else "global_load") in text
