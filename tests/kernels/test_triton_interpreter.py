"""The Triton kernels in Triton's interpreter, bit for bit against an int64 product."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from tests.support import interpreter_works
from tests.support.interpreter import EXTENTS, assert_passed, results_of

pytestmark = interpreter_works


@pytest.fixture(scope="module", params=EXTENTS)
def results(request) -> dict[str, str | None]:
    """Error of every case, or None, by name."""
    return results_of("_interpreter_main", extent=request.param)


GROUPS = ["g32-", "g64-", "g128-", "g256-", "g-1-"]


OTHERS = ["zero-", "w8a8-", "shape", "deep", "split-", "chosen", "shapes", "nan", "quantize"]


@pytest.mark.parametrize("prefix", [*GROUPS, *OTHERS])
def test_kernel_is_exact(results, prefix):
    assert_passed(results, prefix)
