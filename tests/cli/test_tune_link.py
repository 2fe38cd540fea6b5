"""``intscale tune --link``: ranks that it starts itself, the table that they leave, and the thresholds that hold then."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("typer", reason="typer is not installed: pip install 'intscale-compile[cli]'")

import torch.distributed._functional_collectives as fc  # noqa: E402

from intscale_cli import doctor  # noqa: E402
from intscale_compile import explain  # noqa: E402
from intscale_compile.commands import link as command  # noqa: E402
from intscale_compile.communication import link_table, tune_link  # noqa: E402
from intscale_compile.communication.link_table import Key, Link, read_table, write_table  # noqa: E402
from intscale_compile.errors import ConfigError  # noqa: E402
from tests.support import forks  # noqa: E402
from tests.support.cli import in_process  # noqa: E402

SMALL = ["--bytes", 4096, "--bytes", 16384, "--wire", "int8", "--op", "all_reduce"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(link_table.VARIABLE, str(tmp_path / "links"))
    for name in command.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "links"


class Reduced(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(128, 64).requires_grad_(False)

    def forward(self, x):
        return fc.all_reduce(self.proj(x), "sum", dist.group.WORLD)


def test_ranks_are_started_and_their_table_is_read(folder, capfd, monkeypatch):
    """Two processes over gloo; then a graph over a link of that name takes its threshold from what they measured."""
    monkeypatch.setattr(command, "subprocess", forks.instead_of_subprocess())
    code, stdout, stderr = in_process(capfd, "tune", "--link", "--device", "cpu", "--ranks", 2, *SMALL, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    path = folder / "gloo-cpu-2x1.json"
    assert report["path"] == str(path) and "4,096 bytes: plain" in stderr and f"written to {path}" in stderr
    link, times = read_table(path)
    assert link == Link("gloo", "cpu", 2) and set(times) == {Key("all_reduce", "plain"), Key("all_reduce", "int8")}
    assert {(row["wire"], row["bytes"]): row["us"] for row in report["times"]} == {
        (key.wire, size): us for key, found in times.items() for size, us in found.items()
    }
    plain, quantized = (times[Key("all_reduce", wire)] for wire in ("plain", "int8"))
    slower = [size for size in plain if quantized[size] * 1.05 >= plain[size]]
    (row,) = report["thresholds"]
    least = None if 16384 in slower else 16384 if slower else 4096
    assert row == {"op": "all_reduce", "wire": "int8", "bytes": least, "source": "measured"}
    check = {check.name: check for check in doctor.links()}["link gloo-cpu-2x1"]
    said = "never" if least is None else f"from {least:,} bytes"
    assert check.status == doctor.OK and check.found == f"measured; all_reduce: int8 {said}"
    # A group of one of its two ranks: what its backend is called decides which table is read.
    monkeypatch.setattr(link_table, "backend_of", lambda group, device: "gloo")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        (one,) = explain(Reduced(), torch.randn(32, 128), options={"intscale.communication": "int8"}).collectives
    finally:
        dist.destroy_process_group()
    assert one.link == "gloo-cpu-2x1" and one.nbytes == 8192 and one.threshold_source == "measured"
    assert one.threshold == (sys.maxsize if least is None else least)
    assert one.quantized == (least is not None and least <= 8192)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--device", "cpu"], "--ranks 2"),
        (["--device", "cpu", "--ranks", 1], "a link joins at least two"),
        (["--device", "mps"], "use cuda .one rank a GPU. or cpu"),
        (["--device", "cpu", "--ranks", 2, "--wire", "int3"], "'int3' is no wire format"),
        (["--device", "cpu", "--ranks", 2, "--op", "broadcast"], "ops=.*broadcast"),
        (["--device", "cpu", "--ranks", 2, "--bytes", 12], "at least 512 bytes"),
        (["--shape", "64x64"], "--link measures collectives"),
    ],
)
def test_what_is_wrong_is_said_before_a_rank_starts(folder, capsys, monkeypatch, options, said):
    monkeypatch.setattr(command.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a rank was started"))
    code, _, stderr = in_process(capsys, "tune", "--link", *options)
    assert code == 2
    with pytest.raises(ConfigError, match=said):
        raise ConfigError(stderr)


def test_options_of_a_link_without_it(folder, capsys):
    assert in_process(capsys, "tune", "--ranks", 2)[0] == 2


def test_gpus_of_this_host(monkeypatch):
    for gpus, ranks, wanted in (
        (8, None, 8),
        (8, 2, 2),
        (0, None, "no GPU"),
        (1, None, "one GPU"),
        (2, 4, "more than"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)  # noqa: B023
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)  # noqa: B023
        if isinstance(wanted, int):
            assert command.usable_ranks("auto", ranks) == ("cuda", wanted)
        else:
            with pytest.raises(ConfigError, match=wanted):
                command.usable_ranks("auto", ranks)


def test_a_place_that_cannot_be_written(folder, tmp_path, capsys, monkeypatch):
    """A file in the way of the folder refuses even root; every rank says so before it measures."""
    (tmp_path / "file").write_text("")
    code, _, stderr = in_process(
        capsys, "tune", "--link", "--device", "cpu", "--ranks", 2, "--path", tmp_path / "file" / "t.json"
    )
    assert code == 2 and "cannot be written" in stderr and "INTSCALE_LINKS" in stderr
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            tune_link(path=tmp_path / "file" / "t.json", sizes=[4096])
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(dist, "all_reduce", lambda value, *args, **kwargs: value.fill_(1))  # rank 0 has failed
        with pytest.raises(ConfigError, match="another rank cannot write"):
            tune_link(path=folder / "t.json", sizes=[4096])
    finally:
        dist.destroy_process_group()


def test_a_rank_that_fails_takes_the_others_along(monkeypatch):
    codes = iter([[None, None, None], [None, 3, None], [None, 3, 1]])
    current: list = []

    def sleep(seconds):
        current[:] = next(codes)

    sleep(0)
    monkeypatch.setattr(command.time, "sleep", sleep)
    processes = [SimpleNamespace(poll=lambda rank=rank: current[rank]) for rank in range(3)]
    monkeypatch.setattr(command, "GRACE_SECONDS", -1.0)
    assert command._first_failure(processes) == 1
    current[:] = [0, 0, 0]
    assert command._first_failure(processes) is None


def test_doctor_on_links(folder, monkeypatch):
    assert [check.found for check in doctor.links() if torch.cuda.device_count() < 2][-1:] in (
        [],
        [f"no GPU; 0 measured, in {folder}"],
        [f"one GPU; 0 measured, in {folder}"],
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "Fake GPU")
    (note,) = doctor.links()
    assert (note.name, note.status, note.mend) == ("link nccl-fake-gpu-4x1", doctor.NOTE, "intscale tune --link")
    assert "from 8,388,608 bytes on (built-in)" in note.found
    link = Link("nccl", "fake-gpu", 4)
    times = {Key("all_reduce", "plain"): {1024: 2.0, 2048: 5.0}, Key("all_reduce", "int8"): {1024: 3.0, 2048: 4.0}}
    write_table(link_table.table_path(link), link, {}, times)
    (found,) = doctor.links()
    assert found.status == doctor.OK and found.found == "measured; all_reduce: int8 from 2,048 bytes"
    link_table.table_path(link).write_text("{")
    broken, unmeasured = doctor.links()
    assert broken.status == doctor.BROKEN and "cannot be read" in broken.found and unmeasured.status == doctor.NOTE
