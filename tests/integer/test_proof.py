"""``prove``: what it says of a model, and that each of its parts finds what is planted for it."""

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, explain, integer_only
from intscale_compile.errors import IntegerOnlyError
from intscale_compile.integer_only import generated, triton_ir
from intscale_compile.integrations.torch import decompositions_anew
from intscale_compile.kernels.integer import arithmetic, pointwise, rows, scalar
from intscale_compile.kernels.integer.define import DECOMPOSITIONS
from intscale_compile.ops import register_inductor
from tests.support import fake_cuda

pytestmark = pytest.mark.generated


class Block(torch.nn.Module):
    """An embedding and a residual block."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(50, 128), torch.nn.Linear(128, 128)
        self.norm = torch.nn.RMSNorm(128)

    def forward(self, ids):
        x = self.table(ids)
        return x + self.linear(self.norm(x))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    model = Block().eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    return model


IDS = torch.arange(12).view(2, 6)


def refusal(model):
    with pytest.raises(IntegerOnlyError) as caught:
        integer_only.prove(model, IDS)
    return str(caught.value)


def test_a_model_is_proved(block):
    proof = integer_only.prove(block, IDS)
    assert proof.holds and proof.kernels >= 2
    assert proof.ops == {
        "int_embedding": 1, "int_norm_quantize": 1, "int_linear": 1, "int_add": 1, "int_to_float": 1,
    }  # fmt: skip
    by_value = {(bound.op, bound.value): bound for bound in proof.bounds}
    weight = block.linear.weight
    assert 2 ** by_value["int_linear", "accumulator"].bits == pytest.approx(int(weight.accumulator_bound().max()))
    assert "no floating point but the last conversion" in str(proof) and "acc * m * m" in str(proof)


@pytest.fixture
def plant(monkeypatch):
    """Let an op be something else in Inductor, until the test is over."""
    from torch._inductor.decomposition import decompositions

    register_inductor()

    def put(op, planted):
        monkeypatch.setitem(DECOMPOSITIONS, op, planted)
        monkeypatch.setitem(decompositions, op, planted)
        decompositions_anew()

    yield put
    monkeypatch.undo()
    decompositions_anew()


def test_explain_shows_the_bounds(block):
    report = explain(block, IDS, options=integer_only.OPTIONS)
    assert report.integer_ops["int_linear"] == 1 and report.gemms == 1 and report.activation_quantizations == 1
    (row,) = [bound for bound in report.integer_bounds if (bound.op, bound.value) == ("int_linear", "accumulator")]
    assert row.holds and 2**row.bits == pytest.approx(int(block.linear.weight.accumulator_bound().max()))
    assert "sum of squares, doubled" in str(report) and "sum of squares, doubled" in report.to_html()
    assert not explain(block, IDS).integer_bounds


def test_a_planted_float_is_found_by_type_and_in_the_code(block, plant):
    plant(pointwise.ADD_OP, lambda a, b: arithmetic.saturate((a.to(torch.float64) + b).to(torch.int64)))
    text = refusal(block)
    assert "floating point node: " in text and "floating point code: " in text


def test_a_planted_overflow_is_found(block, monkeypatch):
    monkeypatch.setattr(type(block.linear.weight), "accumulator_bound", lambda self: torch.tensor([2**40]))
    assert "OVERFLOWS" in refusal(block)


def test_a_planted_function_in_cpp_is_found():
    conversion = "auto a = at::vec::convert<float>(t);\n auto b = static_cast<float>(1.52587890625e-05);"
    good = f"extern void k(const int32_t* in, float* out) {{\n {conversion}\n}}"
    assert generated.float_lines(good) == []
    assert generated.float_lines(good.replace("1.52587890625e-05", "0.5"))
    assert generated.float_lines(good + "\n auto c = std::exp(b);")
    assert generated.float_lines("auto x = at::vec::VecMask<float,1>::from(t);") == []
    scalar = (
        "float* out_ptr1)\nauto tmp2 = c10::convert<float>(tmp1);\nauto tmp3 = static_cast<float>(1.52587890625e-05);\n"
    )
    scalar += "auto tmp4 = float(tmp2 * tmp3);\n"
    assert generated.float_lines(scalar) == []
    assert generated.float_lines(scalar + 2 * "auto tmp5 = float(tmp4 * tmp4);\n")
    assert generated.float_lines("double y = 1;")


# --- kernels for a GPU ------------------------------------------------------------------------------------------------

LAST = """
  tt.func public @k(%out: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("out"(#loc)), %in: !tt.ptr<i32>) {
    %f32 = arith.constant dense<1.52587891E-5> : tensor<64xf32> loc(#loc1)
    %x = tt.load %in_1, %mask : tensor<64x!tt.ptr<i32>> loc(#loc2)
    %y = arith.sitofp %x : tensor<64xi32> to tensor<64xf32>
    %z = arith.mulf %y, %f32 : tensor<64xf32>
    %acc = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xi8> * tensor<64x16xi8> -> tensor<64x16xi32>
    %w = arith.truncf %z : tensor<64xf32> to tensor<64xbf16>
    tt.store %out_1, %w, %mask : tensor<64x!tt.ptr<bf16>>
"""


@pytest.mark.parametrize(
    "line, planted",
    [
        ("1.52587891E-5", "3.05175781E-5"),
        ("%x : tensor<64xi32> to tensor<64xf32>", "%x : tensor<64xi64> to tensor<64xf32>"),
        ("arith.mulf %y, %f32", "arith.mulf %y, %y"),
        ("arith.mulf", "arith.addf"),
        ("%w = arith.truncf", "%v = math.exp %z : tensor<64xf32>\n    %w = arith.truncf"),
        ("%w = arith.truncf", "%v = arith.fptosi %z : tensor<64xf32> to tensor<64xi32>\n    %w = arith.truncf"),
        ("%w = arith.truncf", "%v = tt.load %p : tensor<64x!tt.ptr<f32>>\n    %w = arith.truncf"),
        ("%w = arith.truncf", '%v = tt.extern_elementwise %a {symbol = "__nv_sqrtf"} : (f32) -> f32\n    %w = arith.truncf'),
        ("tensor<64x16xi8> ->", "tensor<64x16xf8E4M3FN> ->"),
        ("tt.func public @k(", "tt.func private @g(%a: f64) {\n  }\n  tt.func public @k("),
    ],
)  # fmt: skip
def test_floating_point_in_ttir_is_found(line, planted):
    assert triton_ir.float_operations(LAST) == []
    assert line in LAST and triton_ir.float_operations(LAST.replace(line, planted))


def kernels_for_a_gpu(run, *shapes):
    """What Inductor generates for an H100 that is not there, and their TTIR."""
    import torch._inductor.runtime.triton_helpers as helpers

    register_inductor()
    kernels = generated.kernels_of([fake_cuda.generate(run, *fake_cuda.fake_inputs(shapes))])
    with fake_cuda.fake_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "set_driver_to_gpu", lambda: None)
        return kernels, [line for kernel in kernels for line in generated.float_code(kernel)]


def test_generated_triton_kernels_are_read():
    """A norm, a quantization and the last conversion are no floating point; one float in between is."""

    def run(h, gamma):
        codes, scale = rows.NORM_QUANTIZE_OP(h, gamma, None, 7, False)
        total = pointwise.ADD_OP(h, codes.to(torch.int32) * scale)
        total = (total.to(torch.float32) * 0.5).to(torch.int32) if planted else total
        return codes, pointwise.TO_FLOAT_OP(total, torch.bfloat16)

    shapes, planted = [((4, 128), torch.int32), ((128,), torch.int32)], False
    kernels, floats = kernels_for_a_gpu(run, *shapes)
    assert kernels and floats == [] and all(kernel.language == "triton" for kernel in kernels)
    planted = True
    kernels, floats = kernels_for_a_gpu(run, *shapes)
    assert any("arith.mulf" in line for line in floats) and any("arith.fptosi" in line for line in floats)


def test_a_kernel_in_another_language_is_no_proof():
    (kernel,) = generated.kernels_of(['k = async_compile.metal("k", """source""")'])
    assert "cannot read" in generated.float_code(kernel)[0]


MUTATIONS = {
    "ties to even": ("RDIV", lambda a, b: (a.double() / b).round().to(torch.int64)),
    "no rounding": ("RSH", lambda a, k: a >> k.clamp(1, 62)),
    "truncated quotient": ("RDIV", lambda a, b: torch.div(a, b, rounding_mode="trunc")),
    "rough exponential": ("EXP2NEG", lambda z: ((1 << 15) - ((z & 65535) >> 2)) >> (z >> 16).clamp(max=40)),
    "scale of 8 bits": ("TOKEN_SCALE", lambda amax, f: scalar.TOKEN_SCALE(amax, f) >> 8 << 8),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_arithmetic_changes_bits(name):
    """What the oracle of test_integer_ops would see: each mutation gives other numbers on ordinary values."""
    function, mutant = MUTATIONS[name]
    op, values = getattr(scalar, function), torch.arange(1, 4000)
    arguments = {1: (values * 37,), 2: (values * 37, torch.tensor([12]))}[len(op._schema.arguments)]
    assert not torch.equal(op(*arguments), mutant(*arguments))
