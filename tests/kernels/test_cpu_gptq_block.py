"""The compiled rounding of a block of columns has the bits of PyTorch's operators."""

import pytest
import torch

from intscale_compile.calibration import gptq
from intscale_compile.kernels.cpu_gptq_block import library, round_block_cpu


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("batch, count, columns", [(1, 200, 128), (3, 100, 64), (1, 33, 57), (2, 1, 1)])
@pytest.mark.parametrize("code_range", [(-8, 7), (-127, 127)])
def test_codes_and_errors_are_those_of_operators(batch, count, columns, code_range):
    wide = torch.randn(batch, count, columns + 9)
    target, reference = wide[..., 5 : 5 + columns], torch.randn(batch, count, columns)
    steps, rows = torch.rand(batch, count, columns) * 0.3 + 0.01, torch.randn(batch, columns, columns) * 0.1
    found = round_block_cpu(target, reference, steps, rows, code_range)
    wanted = gptq._round_by_operators(target, reference, steps, rows, code_range)
    for a, b in zip(found, wanted):
        assert a.dtype == b.dtype and torch.equal(a, b)


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
