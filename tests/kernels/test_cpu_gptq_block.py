"""The compiled rounding of a block of columns: its bits, and what PyTorch's operators give."""

import pytest
import torch

from intscale_compile.calibration import gptq
from intscale_compile.kernels.cpu_gptq_block import library, round_block_cpu


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("batch, count, columns", [(1, 200, 128), (3, 100, 64), (1, 33, 57), (2, 1, 1)])
@pytest.mark.parametrize("code_range", [(-8, 7), (-127, 127)])
def test_codes_and_errors(batch, count, columns, code_range):
    wide = torch.randn(batch, count, columns + 9)
    target, reference = wide[..., 5 : 5 + columns], torch.randn(batch, count, columns)
    steps, rows = torch.rand(batch, count, columns) * 0.3 + 0.01, torch.randn(batch, columns, columns) * 0.1
    found = round_block_cpu(target, reference, steps, rows, code_range)
    for a, b in zip(found, rounded_at_once(target, reference, steps, rows, code_range)):
        assert a.dtype == b.dtype and torch.equal(a, b)
    # Not every BLAS rounds a product and a sum at once: a code may fall to the other side there, and move those behind it.
    by_operators = gptq._round_by_operators(target, reference, steps, rows, code_range)
    assert [a.dtype for a in by_operators] == [a.dtype for a in found]
    assert (by_operators[0] != found[0]).float().mean() < 1e-3


def rounded_at_once(target, reference, steps, rows, code_range):
    """The same with multiply-adds of one rounding, by sums in float64, in which products of two floats are exact."""
    rest, codes, errors = target.clone(), torch.empty_like(target), torch.empty_like(target)
    for j in range(rest.shape[2]):
        codes[:, :, j] = (rest[:, :, j] / steps[:, :, j]).round().clamp(*code_range)
        errors[:, :, j] = reference[:, :, j] - codes[:, :, j] * steps[:, :, j]
        moved = errors[:, :, j, None].double() * rows[:, j, None, j + 1 :].double()
        rest[:, :, j + 1 :] = (rest[:, :, j + 1 :].double() + moved).float()
    return codes.to(torch.int8), errors


def test_without_a_compiler_operators_round(monkeypatch, tmp_path):
    target, steps, rows = torch.randn(1, 9, 8), torch.rand(1, 9, 8) + 0.1, torch.randn(1, 8, 8)
    wanted = gptq.round_block(target, target, steps, rows, (-8, 7))
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    library.cache_clear()
    try:
        assert round_block_cpu(target, target, steps, rows, (-8, 7)) is None
        for a, b in zip(gptq.round_block(target, target, steps, rows, (-8, 7)), wanted):
            assert torch.equal(a, b)
    finally:
        library.cache_clear()
