"""Decode attention in Triton's interpreter, against PyTorch's attention in fp64."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from tests.support import interpreter_works
from tests.support.interpreter import EXTENTS, assert_passed, results_of

pytestmark = interpreter_works


@pytest.fixture(scope="module", params=EXTENTS)
def results(request) -> dict[str, str | None]:
    """Error of every case, or None, by name."""
    return results_of("_attention_interpreter_main", extent=request.param)


@pytest.mark.parametrize(
    "prefix",
    [
        *("one-tile/", "ragged/", "two-parts/", "features-80/", "two-steps/"),
        *("strided", "hidden-tail", "nothing-visible", "alone", "number-of-parts", "no-sequences"),
    ],
)
def test_decode_attention(results, prefix):
    assert_passed(results, prefix)
