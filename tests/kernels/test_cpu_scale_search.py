"""The compiled search of group scales: it decides as PyTorch's operators do, or leaves the row to them."""

import pytest
import torch

from intscale_compile.kernels import cpu_scale_search
from intscale_compile.reasons import log_once
from intscale_compile.tensors import scale_search
from intscale_compile.tensors.scale_search import PLAIN_STEP, ROW_FRACTIONS, search_integer_scales

LARGEST = 15
STEPS = [fraction / (PLAIN_STEP * LARGEST) for fraction in ROW_FRACTIONS]


def rows(groups: int, size: int, kind: str) -> torch.Tensor:
    x = torch.randn(200, groups, size) * torch.rand(200, groups, 1)
    if kind == "grid":  # many candidates are equally good
        x = (x * 6).round()
    elif kind == "zeros":
        x[:, 0], x[::7] = 0, 0
    return x / x.abs().amax((1, 2), keepdim=True).clamp(min=1e-9)


@pytest.mark.parametrize("kind", ["plain", "grid", "zeros"])
@pytest.mark.parametrize("groups, size", [(1, 64), (3, 32), (2, 128), (2, 256), (2, 48)])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_row_has_what_operators_find(groups, size, kind, weighted):
    x, weights = rows(groups, size, kind), torch.rand(groups, size) + 0.01 if weighted else None
    for found, wanted in zip(
        search_integer_scales(x, LARGEST, weights), scale_search._searched_by_operators(x, LARGEST, STEPS, weights)
    ):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(cpu_scale_search.library() is None, reason="no C++ compiler")
def test_few_rows_are_left_to_operators():
    """Fast only where the compiled search decides nearly every row, and between few candidates; also over several threads."""
    _, _, unsure = cpu_scale_search.search_integer_scales_cpu(rows(5, 128, "plain"), LARGEST, STEPS, None)
    left = [bin(bits).count("1") for bits in unsure.tolist() if bits]
    assert unsure.shape == (200,) and len(left) <= 10 and max(left, default=1) <= 3  # of 24 row steps


def test_without_a_compiler_the_result_is_the_same_and_it_is_said_once(monkeypatch, tmp_path, caplog):
    x = rows(3, 64, "plain")
    wanted = search_integer_scales(x, LARGEST)
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    cpu_scale_search.library.cache_clear()
    log_once.cache_clear()
    try:
        with caplog.at_level("INFO", logger="intscale_compile"):
            for found, expected in zip(
                search_integer_scales(x, LARGEST) + search_integer_scales(x, LARGEST), wanted * 2
            ):
                assert torch.equal(found, expected)
        assert sum("CXX" in record.message for record in caplog.records) == 1
    finally:
        cpu_scale_search.library.cache_clear()
