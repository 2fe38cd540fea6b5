"""benchmarks/read_ahead.py without a GPU: what it compares can run, and its forms replace the rule's."""

from __future__ import annotations

import pytest

from tests.support.benchmarks import load

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def bench():
    return load(("read_ahead",)).read_ahead


def test_every_form_is_legal(bench):
    from intscale_compile.kernels.gluon_tiles import illegal

    for m, n, k, group_size, bits in bench.PROBLEMS:
        shape = bench.Shape(n, k, group_size, bits)
        for tile, _ in bench.forms(m, n, bits, group_size):
            assert illegal(bench.fitted(tile, shape), shape.schedule.partition("/")[0], k) is None, (shape, tile)


def test_a_form_takes_the_rules_place_in_cooperative_tiles_only(bench, monkeypatch):
    monkeypatch.setattr(bench.gluon_launch, "loop_body", bench.RULE)
    wide, other = bench.cooperative(256, 128), bench.specialized(128, 64)
    bench.use(bench.AHEAD)
    assert bench.gluon_launch.loop_body(wide, "fold", False, 32) == (8, True)
    assert bench.gluon_launch.loop_body(wide, "fold", False, 27) == (1, False)
    assert bench.gluon_launch.loop_body(other, "fold", False, 32) == bench.RULE(other, "fold", False, 32)
    bench.use(None)
    assert bench.gluon_launch.loop_body(wide, "fold", False, 32) == bench.RULE(wide, "fold", False, 32)
