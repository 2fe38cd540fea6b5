"""The integer attention kernel: exact in Triton's interpreter; for sm_90, int8 tensor cores and no floating point."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from intscale_compile.integer_only.triton_ir import float_operations
from intscale_compile.kernels.integer.triton_attention import integer_attention_kernel as kernel
from tests.support import interpreter_works, sass
from tests.support.interpreter import EXTENTS, results_of


@interpreter_works
@pytest.mark.parametrize("extent", EXTENTS)
def test_bits_are_those_of_the_aten_form(extent):
    results = results_of("_integer_attention_interpreter_main", extent=extent)
    assert len(results) == (2 if extent == "quick" else 6) and not any(results.values()), results


@pytest.mark.parametrize(
    "features, rows, warps, spilled",
    [(64, 64, 4, 0), pytest.param(128, 64, 8, 256, marks=pytest.mark.slow), pytest.param(64, 16, 4, 0, marks=pytest.mark.slow)],
)  # fmt: skip
def test_assembly(features, rows, warps, spilled, tmp_path):
    names, strides = kernel.arg_names, ("q_b", "q_h", "q_t", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s")
    constants = {
        "HEADS": 4,
        "D": features,
        "BLOCK_D": features,
        "ROWS": rows,
        "BLOCK_S": 64,
        "CAUSAL": True,
        "MASK": False,
    }
    codes = ("q_ptr", "k_ptr", "v_ptr", "mask_ptr")
    types = {name: "*i8" if name in codes else "*i32" if name.endswith("_ptr") else "i32" for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or name in strides
    }
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert float_operations(compiled.asm["ttir"]) == [] and "i8" in compiled.asm["ttir"]
    code = sass.disassemble(compiled, tmp_path)
    assert code.count("IGMMA") + code.count("IMMA") >= 18 and code.spill_bytes <= spilled
    assert code.count("FFMA") + code.count("DFMA") == 0
