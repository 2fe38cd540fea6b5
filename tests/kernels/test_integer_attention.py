"""The integer attention kernel: exact in Triton's interpreter; for sm_90, int8 tensor cores and no floating point."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from intscale_compile.integer_only.triton_ir import float_operations
from intscale_compile.kernels.integer import triton_attention
from tests.support import interpreter_works, sass
from tests.support.interpreter import EXTENTS, results_of

pytestmark = pytest.mark.generated


@interpreter_works
@pytest.mark.parametrize("extent", EXTENTS)
def test_bits_are_those_of_the_aten_form(extent):
    results = results_of("_integer_attention_interpreter_main", extent=extent)
    assert len(results) == (2 if extent == "quick" else 8) and not any(results.values()), results


CASES = [
    ("integer_attention_kernel", {"D": 64, "ROWS": 64}, 4, 32, 18),
    ("integer_attention_kernel", {"D": 128, "ROWS": 64}, 8, 256, 18),
    ("integer_attention_kernel", {"D": 64, "ROWS": 16}, 4, 0, 18),
    ("divided_attention_kernel", {"D": 128, "ROWS": 16, "PASS": 0}, 4, 0, 4),
    ("divided_attention_kernel", {"D": 128, "ROWS": 16, "PASS": 1}, 4, 0, 4),
    ("divided_attention_kernel", {"D": 128, "ROWS": 16, "PASS": 2}, 4, 0, 18),
    ("divided_attention_kernel", {"D": 128, "ROWS": 16, "PASS": 3}, 4, 0, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, form, warps, spilled, products", CASES)
def test_assembly(name, form, warps, spilled, products):
    kernel = getattr(triton_attention, name)
    names, strides = kernel.arg_names, ("q_b", "q_h", "q_t", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s")
    constants = {"HEADS": 4, "BLOCK_D": form["D"], "BLOCK_S": 64, "CAUSAL": True, "MASK": False, **form}
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "mask_ptr"), "*i8")
    pointers |= dict.fromkeys(("top_ptr", "total_ptr", "acc_ptr"), "*i64")
    types = {name: pointers.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or name in strides
    }
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert float_operations(compiled.asm["ttir"]) == []
    code = sass.disassemble(compiled)
    assert code.count("IGMMA") + code.count("IMMA") >= products and code.spill_bytes <= spilled
    assert code.count("FFMA") + code.count("DFMA") == 0
