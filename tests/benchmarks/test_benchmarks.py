"""The GEMM benchmark without a GPU: arguments, budget, tables, targets, picture, and peers that fail."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from tests.support.benchmarks import SHAPES, load

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def bench():
    return load()


def synthetic(bench, us, shapes=SHAPES, tokens=(1, 16, 64, 512, 4096), peers=None, bandwidth=3e12):
    """Results whose times come from ``us(n, k, m, peer)``; None leaves a point out. Ours moves 28672 * 4096 / 2 bytes."""
    peers = peers or [*bench.gemm_results.OWN_PEERS, "bf16", "fp8", *bench.gemm_results.FOUR_BIT_PEERS]
    results = bench.gemm_results.Results({"device": "NVIDIA H100 80GB HBM3"}, bandwidth=bandwidth)
    for (n, k), m, peer in itertools.product(shapes, tokens, peers):
        value = us(n, k, m, peer)
        if value is not None:
            point = bench.gemm_results.Point(n, k, m, peer, [value], copies=2, moved_bytes=n * k // 2)
            results.add(point)
    return results


def good_times(n, k, m, peer):
    """Every target is reached: ours at 95 % of 3 TB/s, everything else twice as slow."""
    ours = max(n * k / 2 / (0.95 * 3e12), 2 * n * k * m / 1500e12) * 1e6
    return ours if peer == "intscale" else 2 * ours


# arguments


def test_default_shapes_hold_every_layer_once(bench):
    args = bench.gemm.parse_arguments([])
    assert len(args.shapes) == 8 and set(SHAPES) <= set(args.shapes) and (57344, 8192) in args.shapes
    assert args.tokens == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert args.peers[0] == "intscale" and len(args.peers) == len(bench.gemm_peers.PEERS)


def test_shapes_mix_names_and_sizes(bench):
    args = bench.gemm.parse_arguments(["--shapes", "512x256", "mixtral-8x7b", "4096x4096", "--tokens", "8", "1", "8"])
    assert args.shapes[0] == (512, 256) and args.shapes.count((4096, 4096)) == 1 and len(args.shapes) == 5
    assert args.tokens == [1, 8]


@pytest.mark.parametrize(
    "argv",
    [["--shapes", "gpt"], ["--shapes", "0x128"], ["--shapes", "128x"], ["--peers", "cutlass"], ["--tokens", "0"]],
)
def test_unusable_arguments_end_with_a_message(bench, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.gemm.parse_arguments(argv)
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err.replace("shape '", "--shapes '")


def test_without_a_gpu_it_says_so(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.gemm.main([])


# timing


def test_budget_counts_down(bench):
    now = SimpleNamespace(value=100.0)
    budget = bench.timing.Budget(10.0, lambda: now.value)
    assert budget.left() == 10.0 and not budget.spent(10.0) and budget.spent(10.1)
    now.value = 111.0
    assert budget.left() == -1.0 and budget.spent()


@pytest.mark.parametrize("nbytes", [1 << 20, 8_650_752, 60_000_000, 150_000_000, 940_000_000])
def test_copies_exceed_twice_the_l2(bench, nbytes):
    count = bench.timing.copy_count(nbytes, 50 << 20)
    assert count >= 2 and count * nbytes > 2 * (50 << 20) and count * nbytes <= 3e9
    assert count == 2 or (count - 1) * nbytes <= 2 * (50 << 20)


def test_copies_stay_below_their_cap(bench):
    assert bench.timing.copy_count(2_000_000_000, 50 << 20) == 1
    assert bench.timing.copy_count(40, 1000, cap=400) == 10


def test_replays_alternate_and_fit_the_budget(bench):
    durations, order = {"fast": 0.1, "middle": 2.0, "slow": 30.0}, []

    def clock(graph):
        order.append(graph)
        return durations[graph] * (1 if order.count(graph) > 1 else 5)  # the first replay is slow

    durations_first = {name: 5 * ms for name, ms in durations.items()}
    times = bench.timing.alternate_ms({n: n for n in durations}, budget_ms=50, least=5, most=40, clock=clock)
    expected = {n: min(40, max(5, int(50 / durations_first[n]))) for n in durations}
    assert {n: len(v) for n, v in times.items()} == expected == {"fast": 40, "middle": 5, "slow": 5}
    assert all(set(v) == {durations[n]} for n, v in times.items())  # the warm-up is not among them
    turns = [index for index, name in enumerate(order[3:]) if name == "slow"]
    assert turns[-1] - turns[0] > len(order) / 2  # spread over the whole, not done at the start
    assert bench.timing.alternate_ms({}, clock=clock) == {}


# tables


@pytest.mark.parametrize(
    "value, text", [(None, "–"), (0.5, "0.50"), (5.126, "5.13"), (51.26, "51.3"), (512.6, "513"), (5126.4, "5126")]
)
def test_numbers_have_three_digits(bench, value, text):
    assert bench.gemm_report.number(value) == text


def test_time_table_and_footnotes(bench):
    results = synthetic(bench, lambda n, k, m, peer: {"intscale": 10.0, "fp8": 20.0}.get(peer), [(256, 128)], (1, 2))
    for m in (1, 2):
        results.add(bench.gemm_results.Point(256, 128, m, "int8_mm", problem="needs M >= 17"))
    results.add(bench.gemm_results.Point(256, 128, 2, "bf16", problem="relative error 1", wrong=True))
    assert bench.gemm_report.time_table(results, (256, 128)).splitlines() == [
        "| M | intscale | fp8 | int8_mm | bf16 |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | 10.0 | 20.0 | – | – |",
        "| 2 | 10.0 | 20.0 | – | wrong |",
    ]
    notes = bench.gemm_report.footnotes(results, (256, 128))
    assert notes == ["- int8_mm, M = 1, 2: needs M >= 17", "- bf16, M = 2: relative error 1"]


def test_columns_stand_in_the_order_of_the_titles(bench):
    results = synthetic(bench, lambda n, k, m, peer: 1.0, [(256, 128)], (4,), ["bf16", "fp8", "intscale"])
    results.titles = {"intscale": "", "bf16": "", "fp8": ""}
    assert bench.gemm_report.time_table(results, (256, 128)).startswith("| M | intscale | bf16 | fp8 |")


def test_ratios_take_the_best_foreign_four_bit_peer(bench):
    times = {"intscale": 10.0, "intscale_ch": 1.0, "fp8": 15.0, "bf16": 25.0, "humming_iws": 13.0, "tinygemm": 12.0}
    results = synthetic(bench, lambda n, k, m, peer: times.get(peer), [(256, 128)], (4,))
    assert bench.gemm_report.ratio_table(results, (256, 128)).endswith("| 4 | 1.50 | 2.50 | 1.30 | 1.20 (tinygemm) |")


def test_bandwidth_is_of_the_bytes_that_ours_moves(bench):
    results = synthetic(bench, lambda n, k, m, peer: 20.0 if peer == "intscale" else None, [(28672, 4096)], (1, 256))
    rows = bench.gemm_report.bandwidth_table(results, (28672, 4096)).splitlines()[2:]
    assert rows == ["| 1 | 58.72 | 2936 | 98 |"]  # nothing above M = 128


def test_claim_table_compares_float_with_integer_scales(bench):
    times = {"intscale": 10.0, "float_scale": 17.0}
    results = synthetic(bench, lambda n, k, m, peer: times.get(peer) if n > 4096 else None, SHAPES[:3], (64,))
    assert bench.gemm_report.claim_table(results).splitlines()[0] == "| M | 28672 x 4096 | 6144 x 4096 |"
    assert bench.gemm_report.claim_table(results).splitlines()[2] == "| 64 | 1.70 | 1.70 |"


# targets


def verdicts(bench, results):
    return {t.label: bench.gemm_results.judge(t, results) for t in bench.gemm_results.TARGETS}


def test_all_targets_pass_on_good_times(bench):
    outcome = verdicts(bench, synthetic(bench, good_times, tokens=(1, 16, 32, 128, 256, 1024, 2048, 8192)))
    assert {v.outcome for v in outcome.values()} == {"PASS"}, outcome
    assert all(v.measured > 0 for v in outcome.values())


@pytest.mark.parametrize(
    "peer, place, factor, missed",
    [
        ("fp8", (4096, 4096, 256), 1.14, {"c: 256 <= M <= 1024, over fp8"}),
        ("fp8", (4096, 4096, 2048), 1.02, {"c: M >= 2048, over fp8"}),
        ("humming_iws", (6144, 4096, 1024), 1.39, {"c: 256 <= M <= 1024, over humming_iws"}),
        ("bf16", (28672, 4096, 8192), 1.69, {"c: M >= 2048, over bf16"}),
        ("humming_iws", (6144, 4096, 32), 1.14, {"b: 32 <= M <= 128, over humming_iws"}),
        ("tinygemm", (6144, 4096, 128), 1.0, {"b: 32 <= M <= 128, faster than every peer"}),
        ("tinygemm", (6144, 4096, 16), 0.99, {"a: M <= 16, slower than no peer"}),
        ("tinygemm", (6144, 4096, 16), 1.0, set()),
        ("float_scale", (4096, 14336, 1024), 1.49, {"d: M >= 1024, integer over float scale"}),
        ("float_scale", (4096, 14336, 1), 0.99, {"d: any M, integer over float scale"}),
        ("intscale_ch", (4096, 14336, 1), 0.5, set()),  # our own variants are no peers
    ],
)
def test_one_slow_point_misses_its_target_alone(bench, peer, place, factor, missed):
    def us(n, k, m, name):
        return (
            factor * good_times(n, k, m, "intscale")
            if (name, (n, k, m)) == (peer, place)
            else good_times(n, k, m, name)
        )

    outcome = verdicts(bench, synthetic(bench, us, tokens=(1, 16, 32, 128, 256, 1024, 2048, 8192)))
    assert {label for label, v in outcome.items() if v.outcome == "MISS"} == missed
    for label in missed:
        assert outcome[label].worst == pytest.approx(factor)
        assert outcome[label].where == f"{place[0]} x {place[1]}, M={place[2]}, {peer}"


@pytest.mark.parametrize("share, missed", [(0.87, 1), (0.74, 2), (0.54, 3), (0.88, 0)])
def test_bandwidth_targets(bench, share, missed):
    def us(n, k, m, peer):
        return n * k / 2 / (share * 3e12) * 1e6 * (1 - 1e-9) if peer == "intscale" else None

    outcome = verdicts(bench, synthetic(bench, us, tokens=(1, 16)))
    shares = [v for label, v in outcome.items() if "bandwidth" in label]
    assert [v.outcome for v in shares].count("MISS") == missed and len(shares) == 3
    assert all(v.worst == pytest.approx(share) for v in shares)


def test_what_was_not_measured_is_not_passed(bench):
    results = synthetic(bench, lambda n, k, m, peer: good_times(n, k, m, peer) if peer == "intscale" else None)
    outcome = verdicts(bench, results)
    assert {v.outcome for label, v in outcome.items() if "over" in label} == {"not measured"}
    assert "not measured" in bench.gemm_report.targets_table(results)


def test_a_target_with_gaps_passes_in_part(bench):
    def us(n, k, m, peer):
        hole = (peer == "fp8" and (n, m) == (6144, 512)) or (peer == "intscale" and n == 6144 and m <= 16)
        hole |= m == 64 and peer in ("bf16", "gemlite_w4a8")  # only the first counts as missing
        return None if hole else good_times(n, k, m, peer)

    outcome = verdicts(bench, synthetic(bench, us))
    assert {label for label, v in outcome.items() if v.outcome == "PASS in part"} == {
        "c: 256 <= M <= 1024, over fp8",
        "a: M <= 16, 4096 x 14336 and 6144 x 4096, share of copy bandwidth",
        "b: 32 <= M <= 128, faster than every peer",
    }
    every = outcome["b: 32 <= M <= 128, faster than every peer"]
    assert every.wanted - every.measured == 4
    fp8 = outcome["c: 256 <= M <= 1024, over fp8"]
    assert (fp8.measured, fp8.wanted) == (3, 4)


def test_a_wrong_result_of_ours_misses(bench):
    results = synthetic(bench, good_times)
    wrong = bench.gemm_results.Point(28672, 4096, 1, "intscale", [5.0], problem="3 outputs are wrong", wrong=True)
    results.points = [p for p in results.points if not (p.peer == "intscale" and (p.n, p.k, p.m) == (28672, 4096, 1))]
    results.add(wrong)
    outcome = verdicts(bench, results)
    for label in ("a: M <= 16, 28672 x 4096, share of copy bandwidth", "a: M <= 16, slower than no peer"):
        assert outcome[label].outcome == "MISS" and "3 outputs are wrong" in outcome[label].where


# files


def test_json_round_trip(bench, tmp_path, capsys):
    results = synthetic(bench, good_times, tokens=(1, 64))
    results.notes.append("gemlite: not installed")
    results.add(bench.gemm_results.Point(256, 128, 1, "fp8", problem="no"))
    results.save(tmp_path / "out.json")
    loaded = bench.gemm_results.Results.load(tmp_path / "out.json")
    assert dataclasses.asdict(loaded) == dataclasses.asdict(results)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    bench.gemm.main(["--report", str(tmp_path / "out.json"), "--picture", str(tmp_path / "out.svg")])
    printed = capsys.readouterr().out
    assert printed.strip() == bench.gemm_report.full_report(results).strip()
    assert "gemlite: not installed" in printed and "| PASS |" in printed and (tmp_path / "out.svg").is_file()


def test_picture_is_well_formed_and_inside_its_frame(bench):
    results = synthetic(bench, good_times, tokens=(1, 16, 256, 4096))
    tree = ElementTree.fromstring(bench.roofline_svg.draw(results))
    width, height = map(float, tree.get("viewBox").split()[2:])
    lines = tree.findall(f"{SVG}polyline")
    assert len(lines) == len(SHAPES) * (len(bench.roofline_svg.PEERS) + 2)
    marks = [(float(c.get("cx")), float(c.get("cy"))) for c in tree.findall(f"{SVG}circle")]
    assert len(marks) == len(SHAPES) * len(bench.roofline_svg.PEERS) * 4  # none is cut off
    points = [tuple(map(float, p.split(","))) for line in lines for p in line.get("points").split()]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in marks + points)
    ours = [float(c.get("cy")) for c in tree.findall(f"{SVG}circle")][:4]
    assert ours == sorted(ours, reverse=True)  # longer times stand higher
    assert ElementTree.fromstring(bench.roofline_svg.text(0, 0, "a < b & c")).text == "a < b & c"


def test_floors_are_below_the_measured_times(bench):
    results = synthetic(bench, good_times, tokens=(1, 4096))
    floors = bench.roofline_svg.floors(results, (28672, 4096))
    assert floors["memory floor"][0] == (1, pytest.approx(28672 * 4096 / 2 / 3e12 * 1e6))
    assert floors["int8 floor"][1] == (4096, pytest.approx(2 * 28672 * 4096 * 4096 / 1979e12 * 1e6))
    ours = dict(bench.roofline_svg.times(results, (28672, 4096))["intscale"])
    assert all(us <= ours[m] for line in floors.values() for m, us in line)
