"""Run the Hadamard kernels in Triton's interpreter; prints ``{"case": ..., "error": null | text}``, one line per case.

A process of its own, because ``TRITON_INTERPRET`` is read when triton is imported.
"""

from __future__ import annotations

import itertools
import sys

from tests.support.interpreter import interpret, run_cases

interpret()

import torch  # noqa: E402

from intscale_compile.kernels.hadamard import reference_hadamard  # noqa: E402
from intscale_compile.kernels.quantize_per_token import quantize_per_token_aten  # noqa: E402
from intscale_compile.kernels.quantize_static import quantize_static_aten  # noqa: E402
from intscale_compile.kernels.triton_hadamard import hadamard_cuda, hadamard_quantize_cuda  # noqa: E402

# rows, features, block size: one block, several, an odd number of them, and the shapes of large models
SHAPES = ((3, 16, 16), (5, 24, 8), (2, 96, 2), (4, 256, 256), (3, 1536, 512), (2, 14336, 2048), (1, 28672, 4096))
# The interpreter truncates fp32 to bf16, hardware rounds to nearest: there the transform of bf16 is compared on a GPU, and
# here with the truncated reference.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUICK = (
    "transform-.*float32|fused-(16-16|24-8|1536|28672)-|transform-(96|256)-|fused-.*-torch.float16-False|"
    "static|ties|rows|not-finite"
)  # see tests/support/interpreter.py


def activation(rows: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Random entries with an outlier in each row."""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(features))
    x[torch.arange(rows), torch.arange(rows) * 7 % features] = 40.0
    return x.to(dtype)


def transformed(x: torch.Tensor, size: int) -> torch.Tensor:
    """The reference, rounded as the interpreter rounds."""
    if x.dtype is not torch.bfloat16 or size == 1:
        return reference_hadamard(x, size) if size > 1 else x
    exact = reference_hadamard(x.float(), size)
    return (exact.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the bit, signs of zeros included."""
    as_bytes = [t.contiguous().view(torch.uint8) for t in (found, expected)]
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*as_bytes)


def check_transform(rows: int, features: int, size: int, dtype: torch.dtype) -> None:
    x = activation(rows, features, dtype)
    assert same_bits(hadamard_cuda(x, size), transformed(x, size))


def check_fused(rows: int, features: int, size: int, dtype: torch.dtype, static: bool) -> None:
    """Codes and scales of the transform that the reference computes."""
    x = activation(rows, features, dtype)
    rotated = transformed(x, size)
    scale = torch.full((1, 1), 0.013) if static else None
    expected = quantize_per_token_aten(rotated) if scale is None else quantize_static_aten(rotated, scale)
    for found, wanted in zip(hadamard_quantize_cuda(x, size, scale), expected):
        assert same_bits(found, wanted), (found - wanted).abs().max()
    if static:
        assert (expected[0].abs() == 127).any(), "nothing was saturated"


def check_ties() -> None:
    """Ties of the static quantizer go to even, and large entries saturate, up to the largest of fp32."""
    x = torch.cat([torch.arange(-300, 300)[None] / 2, torch.full((1, 600), 3.4e38), torch.full((1, 600), -3.4e38)])
    scale = torch.ones(1, 1)
    for found, wanted in zip(hadamard_quantize_cuda(x, 1, scale), quantize_static_aten(x, scale)):
        assert same_bits(found, wanted)


def check_rows() -> None:
    """A scale for each row; leading dimensions; rows not adjacent in memory; no rows; zeros."""
    x, scale = activation(6, 48, torch.float32), torch.rand(6, 1) + 0.01
    expected = quantize_static_aten(reference_hadamard(x, 16), scale)
    for found, wanted in zip(hadamard_quantize_cuda(x, 16, scale), expected):
        assert same_bits(found, wanted)
    for found, wanted in zip(hadamard_quantize_cuda(x.view(2, 3, 48), 16, scale.view(2, 3, 1)), expected):
        assert same_bits(found, wanted.view(2, 3, -1))
    apart = torch.cat([x, x], dim=1)[:, 48:]
    for found, wanted in zip(hadamard_quantize_cuda(apart, 16, scale), expected):
        assert same_bits(found, wanted)
    assert same_bits(hadamard_cuda(apart, 16), reference_hadamard(x, 16))
    assert same_bits(hadamard_cuda(x.t().contiguous().t(), 16), reference_hadamard(x, 16))
    empty = hadamard_quantize_cuda(x[:0], 16, None)
    assert empty[0].shape == (0, 48) and empty[1].shape == (0, 1) and hadamard_cuda(x[:0], 16).shape == (0, 48)
    xq, token_scale = hadamard_quantize_cuda(torch.zeros(2, 48), 16, None)
    assert not xq.any() and (token_scale > 0).all()


def check_not_finite() -> None:
    """A row with NaN or Inf has the scale NaN; other rows keep their bits."""
    for size, scale in itertools.product((1, 16), (None, torch.full((1, 1), 0.02))):
        x = activation(5, 64, torch.float32)
        clean = hadamard_quantize_cuda(x, size, scale)
        x[1, 3], x[3, 63] = float("nan"), float("-inf")
        found = hadamard_quantize_cuda(x, size, scale)
        assert found[1][[1, 3]].isnan().all()
        assert all(same_bits(f[[0, 2, 4]], c[[0, 2, 4]]) for f, c in zip(found, clean))


def main() -> int:
    cases = []
    for (rows, features, size), dtype in itertools.product(SHAPES, DTYPES):
        name, arguments = f"{features}-{size}-{dtype}", (rows, features, size, dtype)
        cases.append((f"transform-{name}", lambda a=arguments: check_transform(*a)))
        for static in (False, True):
            cases.append((f"fused-{name}-{static}", lambda a=arguments, s=static: check_fused(*a, s)))
    for features, dtype in itertools.product((16, 300, 4096), DTYPES):
        arguments = (3, features, 1, dtype, True)
        cases.append((f"static-{features}-{dtype}", lambda a=arguments: check_fused(*a)))
    return run_cases([*cases, ("ties", check_ties), ("rows", check_rows), ("not-finite", check_not_finite)], QUICK)


if __name__ == "__main__":
    sys.exit(main())
