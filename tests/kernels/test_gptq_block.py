"""GPTQ's inner kernel and the weighted scale search: exact in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from intscale_compile.kernels.gptq_block import BLOCK_ROWS, _round_block_kernel
from tests.support import interpreter_works
from tests.support.interpreter import EXTENTS, assert_passed, results_of
from tests.support.sass import assemble


@pytest.fixture(scope="module", params=EXTENTS)
def results(request) -> dict[str, str | None]:
    """Error of every case, or None, by name."""
    return results_of("_gptq_interpreter_main", extent=request.param)


@interpreter_works
@pytest.mark.parametrize("prefix", ["block-", "search-"])
def test_kernel_agrees_with_pytorch(results, prefix):
    assert_passed(results, prefix)


def compile_block(arch: int):
    strides = [f"{x}_{y}" for x in ("target", "reference", "steps") for y in ("batch", "row")]
    pointers = {f"{x}_ptr": "*fp32" for x in ("target", "reference", "steps", "rows", "errors")}
    signature = pointers | {"codes_ptr": "*i8", "N": "i32", "C": "i32", "low": "fp32", "high": "fp32"}
    signature |= dict.fromkeys(strides, "i32")
    return assemble(
        _round_block_kernel,
        signature,
        dict(BLOCK_N=BLOCK_ROWS, BLOCK_C=128),
        GPUTarget("cuda", arch, 32),
        aligned=[*signature],
        num_warps=4,
    )


@pytest.mark.assembles(kernel=compile_block)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_spills(arch, code):
    assert code.spill_bytes == 0 and code.count("MUFU") > 0  # the exact division begins with a reciprocal
