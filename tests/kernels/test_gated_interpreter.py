"""The gated kernel in Triton's interpreter, against the activation of an exact accumulator."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from tests.support import interpreter_works
from tests.support.interpreter import EXTENTS, assert_passed, results_of

pytestmark = interpreter_works


@pytest.fixture(scope="module", params=EXTENTS)
def results(request) -> dict[str, str | None]:
    """Error of every case, or None, by name."""
    return results_of("_gated_interpreter_main", extent=request.param)


@pytest.mark.parametrize(
    "prefix", ["group", "zero-", "silu-", "gelu-", "gelu_tanh-", "w8a8-", "int16-", "one-", "exact", "shapes"]
)
def test_gated_kernel(results, prefix):
    assert_passed(results, prefix)
