"""``tune`` with a pretended GPU: what it picks, refuses, leaves out and writes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig
from intscale_compile.errors import ConfigError
from intscale_compile.kernels import tile_tables
from intscale_compile.kernels.tile import Tile
from intscale_compile.kernels.tile_timing import Job, Shape
from intscale_compile.tuning import main, model_shapes, run, tune

RULE, FAST, WRONG, BROKEN = Tile(16, 64), Tile(32, 64), Tile(64, 64), Tile(128, 64)
SHAPE = Shape(192, 256)


class FakeBench:
    """A GPU on which times are known; a measurement of a point takes ``cost`` seconds."""

    device_name = "NVIDIA Fake (1)"

    def __init__(self, us, faults=None, cost=1.0, compile_cost=0.0):
        self.us, self.faults, self.cost, self.compile_cost = us, faults or {}, cost, compile_cost
        self.now, self.timed, self.jobs, self.m = 0.0, [], [], 0

    def candidates(self, shape, m):
        return list(self.us)

    def compile(self, jobs, seconds=None):
        self.jobs += jobs
        self.now += self.compile_cost

    def load(self, shape, m):
        self.now += self.cost
        self.m = m

    def fault(self, tile):
        return self.faults.get(tile)

    def times(self, tiles, replays):
        self.timed.append((set(tiles), replays))
        return {tile: self.us[tile] for tile in tiles}

    def close(self):
        pass

    def clock(self):
        return self.now

    def versions(self):
        return {"torch": "2", "triton": "3"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "user.json"
    monkeypatch.setenv(tile_tables.VARIABLE, str(path))
    tile_tables.reload()
    yield path
    tile_tables.reload()


def tiles_in(path) -> dict:
    return {(e["schedule"], e["n"], e["k"], e["m"]): e["tile"] for e in json.loads(path.read_text())["entries"]}


def test_the_fastest_correct_tile_is_stored_and_found(table, capsys):
    bench = FakeBench({RULE: 9.0, FAST: 5.0, WRONG: 1.0, BROKEN: 2.0}, {WRONG: "wrong", BROKEN: "OutOfResources"})
    assert tile_tables.lookup(bench.device_name, "fold", 192, 256, 10) is None
    entries = run(bench, [SHAPE], [4, 16])
    assert [entry["m"] for entry in entries] == [4, 16] and all(entry["us"] == 5.0 for entry in entries)
    assert tile_tables.lookup(bench.device_name, "fold", 192, 256, 10) == FAST
    assert all(WRONG not in tiles and BROKEN not in tiles for tiles, _ in bench.timed), "a wrong tile was timed"
    out = capsys.readouterr().out
    assert "192x256 fold M=4: 5.00 us" in out and "the rule's 9.00 us" in out and "2 refused" in out


def test_compiles_before_timing_and_times_the_best_few_again(table):
    bench = FakeBench({Tile(16, 64, num_stages=s): float(10 - s) for s in range(1, 8)})
    run(bench, [SHAPE], [8], progress=False)
    assert set(bench.jobs) == {Job(SHAPE, 8, tile) for tile in bench.us}
    (everything, few), (finalists, more) = bench.timed
    assert everything == set(bench.us) and more > few
    assert finalists == {Tile(16, 64, num_stages=s) for s in (4, 5, 6, 7)}


def test_no_entry_where_every_candidate_is_wrong(table, capsys):
    assert run(FakeBench({WRONG: 1.0}, {WRONG: "its accumulator is wrong"}), [SHAPE], [4]) == []
    assert not table.exists() and "accumulator is wrong" in capsys.readouterr().out


def test_the_budget_ends_it_and_what_is_left_is_said(table, capsys):
    entries = run(FakeBench({FAST: 5.0}, cost=2.0), [SHAPE, Shape(64, 256)], [1, 2, 4], seconds=5)
    assert [(entry["n"], entry["m"]) for entry in entries] == [(192, 1), (192, 2), (192, 4)]
    assert "left out: 64x256 fold M=1, 64x256 fold M=2, 64x256 fold M=4" in capsys.readouterr().out
    assert len(tiles_in(table)) == 3
    with pytest.warns(UserWarning, match="left out: 192x256 fold M=1"):
        assert run(FakeBench({FAST: 5.0}, compile_cost=9.0), [SHAPE], [1], seconds=5, progress=False) == []


def test_the_table_is_merged_and_written_whole(table):
    run(FakeBench({FAST: 5.0}), [SHAPE], [1, 4], progress=False)
    run(FakeBench({RULE: 3.0}), [SHAPE, Shape(64, 256, 128, 8)], [4], progress=False)
    found = tiles_in(table)
    assert found["fold", 192, 256, 1]["block_m"] == 32 and found["fold", 192, 256, 4]["block_m"] == 16
    assert ("accumulate", 64, 256, 4) in found and len(found) == 3
    assert [path.name for path in table.parent.iterdir()] == [table.name], "a temporary file is left"
    device, _ = tile_tables.read_table(table)
    assert device.fullmatch("NVIDIA Fake (1)") and not device.fullmatch("NVIDIA Fake 1")


def test_a_table_of_another_gpu_or_a_broken_one_is_refused_before_the_work(table):
    run(FakeBench({FAST: 5.0}), [SHAPE], [1], progress=False)
    other = FakeBench({FAST: 5.0})
    other.device_name = "NVIDIA Other"
    with pytest.raises(ConfigError, match="is for the GPU"):
        run(other, [SHAPE], [1], progress=False)
    table.write_text("{")
    with pytest.raises(ConfigError, match=r"user\.json"):
        run(other, [SHAPE], [1], progress=False)
    assert other.timed == [] and table.read_text() == "{"


def test_small_jobs_keep_what_triton_specializes_on():
    for m in (1, 8, 16, 48):
        small = Job(Shape(4104, 4096), m, RULE).small()
        assert small.shape.k == 4096 and (small.shape.n - 4104) % 16 == 0
        assert (small.m == 1) == (m == 1) and (small.m % 16 == 0) == (m % 16 == 0)
    gluon = Tile(8, 32, kernel="decode")
    assert Job(SHAPE, 1, gluon).small() == Job(Shape(448, 256), 8, gluon).small(), "M is not specialized there"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(table):
    with pytest.raises(ConfigError, match="needs a GPU"):
        intscale_compile.tune([(128, 128)], [1])
    with pytest.raises(SystemExit, match="needs a GPU"):
        main(["--shapes", "128x256", "--tokens", "1"])
    assert not table.exists()


@pytest.mark.parametrize("shapes, tokens", [([(0, 128)], [1]), ([(1, 2, 3)], [1]), ([], [1]), ([(64, 64)], [0])])
def test_bad_arguments(shapes, tokens):
    with pytest.raises(ConfigError, match="tune: "):
        tune(shapes, tokens)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(256, 256), nn.Linear(256, 64), nn.Linear(256, 64)
        self.o_proj, self.gate_proj = nn.Linear(256, 256), nn.Linear(256, 512)


def test_shapes_of_a_model():
    model = nn.Sequential(Block(), Block())
    with pytest.raises(ConfigError, match="quantize it first"):
        tune(model)
    quantize_(model, IntScaleConfig(scale_bits=8))
    shapes = model_shapes(model)
    assert set(shapes) == {Shape(384, 256, 128, 8), Shape(256, 256, 128, 8), Shape(512, 256, 128, 8)}
    assert len(shapes) == 6, "siblings count as one"
