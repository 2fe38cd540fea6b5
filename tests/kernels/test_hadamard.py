"""The Hadamard transform and the kernel that quantizes behind it: reference, ops, interpreter, and machine code."""

from __future__ import annotations

import itertools

import pytest
import torch

from intscale_compile.errors import InputError
from intscale_compile.kernels.hadamard import HADAMARD_OP, HADAMARD_QUANTIZE_OP, hadamard_transform
from intscale_compile.kernels.quantize_per_token import quantize_per_token_aten
from intscale_compile.kernels.quantize_static import quantize_static_aten
from tests.support import interpreter_works
from tests.support.interpreter import EXTENTS, assert_passed, results_of

SHAPES = [(1, 8, 2), (3, 96, 32), (2, 1536, 512), (2, 14336, 2048), (1, 28672, 4096)]  # rows, features, size


def sylvester(size: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix by its definition, in fp64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / size**0.5


@pytest.mark.parametrize("rows, features, size", SHAPES)
def test_transform_is_the_product_with_the_matrix(rows, features, size):
    x = torch.randn(rows, features)
    exact = (x.double().view(-1, size) @ sylvester(size)).view(rows, features)
    found = hadamard_transform(x, size)
    # One rounding of fp32 for each stage and one for the factor, on numbers that grow to their final norm.
    bound = (size.bit_length() + 1) * 2.0**-24 * x.double().view(-1, size).norm(dim=1).max()
    assert found.dtype == torch.float32 and (found - exact).abs().max() <= bound
    assert (hadamard_transform(found, size) - x).abs().max() <= 2 * bound, "not its own inverse"


@pytest.mark.parametrize("size", [2, 16, 64, 1024])
def test_transform_of_unit_vectors_is_exact(size):
    """Signs in Sylvester order, and symmetric; sizes that are squares of 2 have an exact factor."""
    found = hadamard_transform(torch.eye(size), size)
    assert torch.equal(found.sign().double(), sylvester(size).sign()) and torch.equal(found, found.t())
    assert torch.equal(found, sylvester(size).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(dtype):
    x = torch.randn(5, 256).to(dtype)
    found = hadamard_transform(x, 64)
    assert found.dtype == dtype and torch.equal(found, hadamard_transform(x.float(), 64).to(dtype))


def test_leading_dimensions_strides_and_many_blocks():
    x = torch.randn(2, 3, 5, 192)
    flat = hadamard_transform(x.view(-1, 192), 64)
    assert torch.equal(hadamard_transform(x, 64), flat.view_as(x))
    assert torch.equal(hadamard_transform(x.transpose(0, 2), 64), flat.view_as(x).transpose(0, 2))
    assert torch.equal(hadamard_transform(x[0, 0, 0], 64), flat[0])
    assert hadamard_transform(x[:0], 64).shape == (0, 3, 5, 192)
    many = torch.randn(9000, 64)  # more than the reference takes at a time
    assert torch.equal(hadamard_transform(many, 64)[-7:], hadamard_transform(many[-7:], 64))


def test_blocks_do_not_mix():
    x = torch.zeros(1, 64)
    x[0, 20] = 4.0
    found = hadamard_transform(x, 16)
    assert found[0, 16:32].abs().eq(1.0).all() and not found[0, :16].any() and not found[0, 32:].any()


@pytest.mark.parametrize("size", [0, 1, -2, 3, 48])
def test_sizes_that_are_no_powers_of_two(size):
    with pytest.raises(InputError, match=f"size={size}: .*power of two"):
        hadamard_transform(torch.ones(2, 96), size)


def test_sizes_that_do_not_divide():
    with pytest.raises(InputError, match="size=64 does not divide the 96 features"):
        hadamard_transform(torch.ones(2, 96), 64)
    with pytest.raises(InputError, match="float64"):
        hadamard_transform(torch.ones(2, 96).double(), 32)


def test_gradient_is_the_transform_of_the_gradient():
    x = torch.randn(3, 96, requires_grad=True)
    grad = torch.randn(3, 96)
    hadamard_transform(x, 32).backward(grad)
    assert torch.equal(x.grad, hadamard_transform(grad, 32))
    exact = (grad.double().view(-1, 32) @ sylvester(32)).view(3, 96)
    torch.testing.assert_close(x.grad.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
def test_fused_op_is_transform_then_quantizer(dtype, static):
    x = torch.randn(4, 5, 96).to(dtype)
    scale = torch.full((1, 1), 0.02) if static else None
    rotated = hadamard_transform(x, 32)
    expected = quantize_static_aten(rotated, scale) if static else quantize_per_token_aten(rotated)
    for found, wanted in zip(HADAMARD_QUANTIZE_OP(x, 32, scale), expected):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "shape, dtype", [((3, 64), torch.float32), ((2, 3, 64), torch.bfloat16), ((64,), torch.float32)]
)
def test_opcheck(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    torch.library.opcheck(HADAMARD_OP, (x, 16))
    torch.library.opcheck(HADAMARD_OP, (x.detach().requires_grad_(), 16))
    for scale in (None, torch.full((1, 1), 0.1)):
        torch.library.opcheck(HADAMARD_QUANTIZE_OP, (x, 16, scale))


# --- Triton -------------------------------------------------------------------------------------------------------------


LONGEST = (32768, 32768)  # features, and of one transform
OTHER_SIZES = ((4096, 4096), (28672, 4096), (11008, 256), (14336, 1))


@interpreter_works
@pytest.mark.parametrize("prefix", ["transform", "fused", "static", "ties", "rows", "not-finite"])
def test_kernels_have_the_bits_of_the_reference(interpreted, prefix):
    assert_passed(interpreted, prefix)


@pytest.fixture(scope="module", params=EXTENTS)
def interpreted(request) -> dict[str, str | None]:
    """Error of every case, or None, by name."""
    pytest.importorskip("triton")
    return results_of("_hadamard_interpreter_main", extent=request.param)


def compile_fused(features: int, size: int, static: bool):
    """The fused kernel for bf16 rows on sm_90."""
    from triton.backends.compiler import GPUTarget

    from intscale_compile.kernels.quantize_per_token import SMALLEST_AMAX
    from intscale_compile.kernels.triton_hadamard import form, hadamard_quantize_kernel
    from tests.support.sass import assemble

    options = form(size, features)
    signature = dict(x_ptr="*bf16", xq_ptr="*i8", token_scale_ptr="*fp32", K="i32", x_stride="i32")
    signature |= dict(activation_scale_stride="i32", **({"activation_scale_ptr": "*fp32"} if static else {}))
    launch = ("num_warps", "enable_fp_fusion")
    constants = {name: value for name, value in options.items() if name not in launch} | dict(SMALLEST=SMALLEST_AMAX)
    constants |= {} if static else {"activation_scale_ptr": None}
    aligned = ["x_ptr", "xq_ptr", "token_scale_ptr", "K", "x_stride"]
    return assemble(
        hadamard_quantize_kernel, signature, constants, GPUTarget("cuda", 90, 32), aligned=aligned,
        **{name: options[name] for name in launch},
    )  # fmt: skip


@pytest.mark.assembles(kernel=compile_fused)
@pytest.mark.parametrize(
    "features, size, static",
    [
        pytest.param(*sizes, static, marks=() if sizes in quick else pytest.mark.slow)
        for static, quick in ((False, (LONGEST, (14336, 1))), (True, ((14336, 2048),)))
        for sizes in ((14336, 2048), LONGEST, *OTHER_SIZES)
    ],
)
def test_rows_stay_in_registers(features, size, static, code):
    """No spills on Hopper, one wide load of each entry, and rounding to nearest where the transform ends."""
    from intscale_compile.kernels.triton_hadamard import form

    launched = form(size, features)
    assert code.spill_bytes == 0 and code.count("STL") == code.count("LDL") == 0
    wide = [i for i in code.instructions if i.base == "LDG" and i.opcode.endswith(".128")]
    assert len(wide) == max(1, launched["LENGTH"] * 2 // (16 * 32 * launched["num_warps"]))
    assert size == 1 or "cvt.rn.bf16" in code.asm["ptx"]
    # Sums of the butterflies are split over the threads, and nothing is computed twice.
    entries = launched["LENGTH"] // (32 * launched["num_warps"])
    sums = entries * launched["STAGES"]
    assert sums <= code.count("FADD") <= sums + 2 * entries + 8


@pytest.mark.parametrize("arch", [80, 100])
def test_bare_transform_assembles_elsewhere(arch):
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from intscale_compile.kernels.triton_hadamard import PIECE, form, hadamard_kernel
    from tests.support.sass import assemble, disassemble

    options = form(2048, PIECE)
    constants = {name: options[name] for name in ("STAGES", "NORM", "LENGTH")}
    signature = dict(x_ptr="*bf16", out_ptr="*bf16", count="i32")
    compiled = assemble(
        hadamard_kernel, signature, constants, GPUTarget("cuda", arch, 32), aligned=list(signature), num_warps=8
    )
    assert disassemble(compiled).spill_bytes == 0


def test_every_size_and_length_has_a_form():
    pytest.importorskip("triton")
    from intscale_compile.kernels.triton_hadamard import LONGEST_ROW, MOST_WARPS, form

    for exponent, length in itertools.product(range(0, 16), (1, 16, 100, 4096, LONGEST_ROW)):
        chosen = form(1 << exponent, length)
        assert chosen["LENGTH"] >= max(1 << exponent, length) and chosen["LENGTH"] <= LONGEST_ROW
        assert 1 <= chosen["num_warps"] <= MOST_WARPS and chosen["STAGES"] == exponent
