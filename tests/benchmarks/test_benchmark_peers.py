"""The peers of the GEMM benchmark without a GPU: what fails, what is checked, what is compiled."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.support.benchmarks import load


@pytest.fixture(scope="module")
def bench():
    return load()


def fake_peers(bench):
    """One right peer, and one for each way to fail."""
    bf16 = bench.gemm_peers.torch_peers.Bf16

    def refuse_import():
        raise ModuleNotFoundError("No module named 'nowhere'")

    def fail(self, *args):
        raise RuntimeError("no kernel image\nis available")

    zeros = lambda self, x, tensors: torch.zeros(x.bf16.shape[0], self.out_features)  # noqa: E731
    empty = lambda self, x, tensors: torch.full((x.bf16.shape[0], self.out_features), float("nan"))  # noqa: E731
    parts = {
        "right": {},
        "absent": {"require": staticmethod(refuse_import)},
        "unprepared": {"prepare": fail},
        "raising": {"run": fail},
        "zeros": {"run": zeros},
        "unwritten": {"run": empty},
        "narrow": {"max_tokens": 2},
    }
    return {name: type(name, (bf16,), {"name": name, "title": name, **body}) for name, body in parts.items()}


@pytest.fixture
def make_run(bench, monkeypatch):
    """A run on the CPU: no graphs, one millisecond for every replay."""
    peers = fake_peers(bench)
    monkeypatch.setattr(bench.gemm, "PEERS", peers)
    monkeypatch.setattr(bench.gemm, "capture", lambda calls: [call() for call in calls])
    monkeypatch.setattr(bench.gemm, "alternate_ms", lambda graphs, budget: {name: [1.0, 1.0] for name in graphs})
    monkeypatch.setattr(bench.gemm, "l2_bytes", lambda: 100_000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def make(shapes=((256, 128),), tokens=(1, 4), names=tuple(peers), json=None, clock=lambda: 0.0):
        args = SimpleNamespace(shapes=list(shapes), tokens=list(tokens), peers=list(names), json=json, picture=None)
        results = bench.gemm_results.Results()
        run = bench.gemm.Run(args, results, bench.timing.Budget(60.0, clock), device="cpu")
        run.select_peers()
        return run, results

    return make


def test_a_failing_peer_becomes_a_footnote_and_nothing_else(bench, make_run, capsys):
    run, results = make_run()
    run.measure_all()
    printed = capsys.readouterr().out
    copies = bench.timing.copy_count(256 * 128 * 2, 100_000)
    assert results.time((256, 128), 1, "right") == results.time((256, 128), 4, "right") == 1e3 / copies
    assert results.time((256, 128), 1, "narrow") and results.time((256, 128), 4, "narrow") is None
    assert results.notes == ["absent: ModuleNotFoundError: No module named 'nowhere'"]
    for name in ("unprepared", "raising"):
        assert f"- {name}, M = 1, 4: RuntimeError: no kernel image is available" in printed
    assert "- narrow, M = 4: not measured above M = 2" in printed
    assert re.search(r"^\| 4 \| [\d.]+ \| – \| – \| wrong \| wrong \| – \|$", printed, re.M), printed
    assert re.search(r"- unwritten, M = 1, 4: relative error nan", printed)


def test_time_that_is_left_decides_what_is_measured(bench, make_run, capsys):
    now = SimpleNamespace(value=0.0)
    run, results = make_run(shapes=[(256, 128), (128, 128)], names=["right"], clock=lambda: now.value)
    measure = run.measure
    run.measure = lambda *args: (measure(*args), setattr(now, "value", now.value + 56))
    run.measure_all()
    assert [(p.n, p.m) for p in results.points] == [(256, 1)]
    assert results.notes == ["256 x 128, M = [4]: no time left", "128 x 128: no time left"]
    assert "no time left" in bench.gemm_report.closing(results)


def test_a_lost_device_ends_the_run_and_keeps_what_was_measured(bench, make_run, monkeypatch, tmp_path):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    run, results = make_run(
        tokens=[1], names=["right", "raising"], shapes=[(256, 128), (128, 128)], json=tmp_path / "a"
    )
    prepare = run.prepare
    run.prepare = lambda shape: (prepare(shape), monkeypatch.setattr(torch.cuda, "synchronize", lost))[0]
    run.measure_all()
    assert len(results.notes) == 1 and "raising at 256 x 128, M = 1: RuntimeError: an illegal" in results.notes[0]
    assert bench.gemm_results.Results.load(tmp_path / "a").point((256, 128), 1, "raising").problem
    assert results.shapes == [(256, 128)]


def test_names_of_the_results_are_those_of_the_peers(bench):
    peers, results = bench.gemm_peers.PEERS, bench.gemm_results
    assert set(results.OWN_PEERS) == {name for name, peer in peers.items() if peer.ours}
    assert set(results.FOUR_BIT_PEERS) == {name for name, peer in peers.items() if peer.four_bit and not peer.ours}
    assert all(peer.name == name and peer.title for name, peer in peers.items())
    assert set(bench.roofline_svg.PEERS) <= set(peers)


def test_int4_groups_round_to_the_nearest_code(bench):
    weight = torch.randn(16, 256)
    before = weight.clone()
    codes, scale = bench.gemm_peers.base.int4_groups(weight, 128)
    value = (codes.float() - 8).unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)
    assert torch.equal(weight, before) and codes.dtype == torch.uint8 and codes.max() <= 15
    assert ((value - weight.unflatten(-1, (-1, 128))).abs() <= 0.51 * scale.unsqueeze(-1)).all()


def test_checks_look_at_both_ends(bench):
    ends = bench.gemm_peers.base.ends
    assert ends(5, 64).tolist() == [0, 1, 2, 3, 4] and ends(10, 4).tolist() == [0, 1, 8, 9]


def test_int8_products_are_checked_exactly(bench):
    peer = bench.gemm_peers.PEERS["int8_mm"](torch.randn(64, 128, dtype=torch.bfloat16), None)
    x = bench.gemm_peers.Activations(32, 128, "cpu")
    assert peer.check(x)[0] == 0.0 and peer.refuse(16) and peer.refuse(17) is None
    run = peer.run
    peer.run = lambda *args: run(*args).index_add(1, torch.tensor([3]), torch.ones(32, 1, dtype=torch.int32))
    with pytest.raises(bench.gemm_peers.WrongResult):
        peer.check(x)


@pytest.mark.parametrize("name", ["intscale", "intscale_sb8", "intscale_ch", "intscale_w8a8"])
def test_ours_is_checked_against_the_integers(bench, name):
    from intscale_compile.kernels.abi import KERNEL_ABI

    peer = bench.gemm_peers.PEERS[name](torch.randn(640, 256, dtype=torch.bfloat16), SimpleNamespace(exact=False))
    x = bench.gemm_peers.Activations(70, 256, "cpu")

    def cpu(x, tensors, shift=0):
        t, (xq, token_scale), (qdata, scale, row_scale) = peer.packed, x.int8, tensors
        return torch.ops.intscale.w4a8_linear(
            xq, token_scale, qdata, scale + shift, row_scale, None,
            t.out_features, t.group_size, t.scale_bits, t.packing_format, torch.bfloat16, KERNEL_ABI,
        )  # fmt: skip

    peer.run = cpu
    error, out = peer.check(x)
    assert error < 2.0**-8 and peer.moved_bytes(x, out) == sum(t.nbytes for t in (*x.int8, *peer.tensors, out))
    peer.run = lambda x, tensors: cpu(x, tensors, shift=1)
    with pytest.raises(bench.gemm_peers.WrongResult, match="sampled outputs are wrong"):
        peer.check(x)


def test_float_scales_are_laid_out_as_integer_scales_are(bench, monkeypatch):
    """The ablation gets the codes and, as floats, the scales of the default configuration."""
    seen = {}

    def linear_float_scale(xq, token_scale, qdata, float_scale, out_features, group_size, dtype, tile=None):
        seen.update(qdata=qdata, scale=float_scale)
        codes = bench.gemm_peers.our_peers.IntScaleTensor.from_hp(weight).codes.float()
        wide = codes.unflatten(-1, (-1, group_size)) * float_scale.unsqueeze(-1)
        return ((xq.float() * token_scale) @ wide.flatten(-2).t()).to(dtype)

    module = ModuleType("float_scale")
    module.linear_float_scale = linear_float_scale
    monkeypatch.setitem(sys.modules, "float_scale", module)
    kind = bench.gemm_peers.PEERS["float_scale"]
    kind.require()
    weight = torch.randn(64, 256, dtype=torch.bfloat16)
    peer = kind(weight, None)
    assert peer.check(bench.gemm_peers.Activations(8, 256, "cpu"))[0] < 0.01
    assert seen["scale"].shape == (64, 2) and seen["scale"].dtype == torch.float32


def test_humming_compiles_only_what_the_sizes_select(bench, monkeypatch):
    import json

    intervals = [[0, 8, {"block": 8}], [8, 64, {"block": 16}], [64, 512, {"block": 64}], [512, 1 << 30, {"block": 128}]]
    module = ModuleType("humming.tune")
    module.get_heuristics_config = lambda config, device: intervals
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.tune", module)
    tuning = bench.gemm_peers.humming_peers.tuning_for(None, [64, 513])
    assert json.loads(tuning) == [intervals[0], intervals[1], intervals[3]]


def test_compiling_ahead_reports_and_goes_on(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "humming", None)  # importing it fails
    peers = [bench.gemm_peers.PEERS[name] for name in ("humming_g128", "bf16")]
    failures = bench.gemm_peers.compile_ahead(peers, [(128, 128), (256, 128)], [1], None)
    assert len(failures) == 2 and all(f.startswith("humming_g128") and "ModuleNotFoundError" in f for f in failures)
