"""The benchmarks of collectives on the CPU: real ranks over gloo, a shaped link where the machine lets us, and the arithmetic."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from intscale_compile.communication.fused_kernel import schedule
from intscale_compile.communication.link_cost import CostModel, plain_bytes, wire_bytes
from intscale_compile.communication.message import WireFormat
from intscale_compile.communication.reference import simulate_all_reduce
from tests.support import forks
from tests.support.benchmarks import BENCHMARKS, load

WIRES = ("int8", "int4")
SIZES = tuple(1 << power for power in range(16, 27, 2))


@pytest.fixture(scope="module")
def bench():
    parts = ("report", "results", "projection", "stress", "peers", "compile_ahead")
    return load(("allreduce", "e2e_parallel", "ranks", "slow_link", *(f"allreduce_parts.{part}" for part in parts)))


@pytest.fixture(scope="module")
def measured(bench, tmp_path_factory):
    """One run with two ranks: twenty random collectives, then two sizes."""
    folder, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    options = ["--backend", "gloo", "--sizes", "4K", "256K", "--replay-ms", "10"]
    options += ["--wires", *WIRES, "--stress", "20", "--dtypes", "bfloat16", "float32", "--most", "16K"]
    options += ["--json", str(folder / "run.json"), "--svg", str(folder / "run.svg"), "--seconds", "100"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(bench.ranks, "subprocess", forks.instead_of_subprocess())
        patch.setattr(sys, "argv", [str(BENCHMARKS / "allreduce.py"), *options])
        patch.setenv("OMP_NUM_THREADS", "1")
        assert bench.allreduce.main(options) == 0
    return folder, printed.getvalue()


def test_every_peer_is_measured_at_every_size(bench, measured):
    folder, printed = measured
    results = bench.results.Results.load(folder / "run.json")
    assert results.sizes == [4096, 262144] and results.peers == ["plain", *WIRES] and results.faults == []
    assert (results.backend, results.ranks) == ("gloo", 2)
    for point in results.points:
        assert point.us > 0 and len(point.samples_us) >= 5 and not point.graph
        low, high = {"plain": (0.0005, 0.004), "int8": (0.004, 0.01), "int4": (0.08, 0.15)}[point.peer]
        assert low < point.error < high
    assert f"({results.ratio(262144, 'int4'):.2f}x)" in printed.replace("*", "") and "| 4 KB |" in printed
    assert ElementTree.parse(folder / "run.svg").getroot().tag.endswith("svg")


def test_random_collectives_have_the_bits_of_the_reference(measured):
    assert "stress: 20 collectives (20 operator)" in measured[1] and "0 wrong results" in measured[1]


def synthetic(bench, model: CostModel, wires=WIRES, backend="nccl"):
    """A run whose times are those of a cost model."""
    results = bench.results.Results({"device": "a GPU"}, backend, "nvlink", model.ranks)
    for nbytes in SIZES:
        times = {"plain": model.plain_us(nbytes), **{wire: model.quantized_us(nbytes, wire) for wire in wires}}
        results.points += [bench.results.Point(nbytes, peer, us, [us], 0.01, True) for peer, us in times.items()]
    return results


def test_faults_are_shown(bench):
    results = synthetic(bench, CostModel("all_reduce", 2, 10.0, 1e-5, 30.0, 1e-5, 1e-6))
    assert results.faults == [] and "identical on all ranks everywhere" in bench.report.table(results)
    results.points[1].identical = results.points[2].repeatable = False
    assert len(results.faults) == 2
    text = bench.report.table(results)
    assert "RANKS DIFFER" in text and "CALLS DIFFER" in text and "except where said" in text
    assert bench.report.cell(results, SIZES[0], "two_shot") == "-"


def test_projection(bench):
    model = CostModel("all_reduce", 2, 12.0, 3e-6, 25.0, 3.5e-6, 2e-6)
    found = bench.projection.fitted(synthetic(bench, model), fused=False)
    for name in ("alpha_plain", "beta_plain", "alpha", "beta", "gamma"):
        assert getattr(found, name) == pytest.approx(getattr(model, name), rel=1e-3)
    assert bench.projection.fitted(synthetic(bench, model), fused=True) is None
    nbytes = 1 << 25
    eight = bench.projection.projected(model, 8, 25e9)
    sent = plain_bytes("all_reduce", 8, nbytes)
    assert sent == pytest.approx(1.75 * nbytes) and eight.plain_us(nbytes) == pytest.approx(12 + sent / 25e9 * 1e6)
    worked = 2e-6 * (1 + 2 * 7 / 8) / 2 * nbytes
    assert eight.quantized_us(nbytes, "int4") == pytest.approx(
        25 + wire_bytes("all_reduce", 8, nbytes, "int4") / 25e9 * 1e6 + worked
    )
    text = bench.projection.table(synthetic(bench, model))
    assert text.startswith("**Projection, not a measurement**") and "PCIe 4.0" in text and "8, projected" in text
    assert "2, fitted" in text and "off by 0%" in text
    assert "PCIe" not in bench.projection.table(synthetic(bench, model, backend="gloo"))  # no kernels of a GPU
    assert "nothing to project" in bench.projection.table(bench.results.Results({}, "nccl", "nvlink", 2))


def test_a_wrong_result_is_counted(bench):
    x = torch.tensor([1.0, float("nan"), -2.0], dtype=torch.bfloat16)
    assert not bench.stress.differs(x, x.clone())
    assert not bench.stress.differs(x.float(), x.float())
    other = x.clone()
    other[2] = -2.015625
    assert bench.stress.differs(x, other) and bench.stress.differs(x, torch.tensor([1.0, 3.0, -2.0]).bfloat16())
    assert bench.stress.differs(torch.zeros(1), -torch.zeros(1))


@pytest.mark.parametrize("wire", ["int8", "int4-spikes", "int5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_messages_at_once_have_the_bits_of_the_reference(bench, wire, dtype):
    form = WireFormat.parse(wire)
    for ranks, elements in ((3, 1000), (4, 129), (2, 4096)):
        inputs = torch.randn(ranks, elements).to(dtype)
        inputs[1, elements // 2] = math.inf if elements == 1000 else 3.0
        wanted = simulate_all_reduce(list(inputs), form)
        assert not bench.stress.differs(bench.stress.all_at_once(inputs, form), wanted)


def test_random_cases_are_the_same_on_every_rank(bench):
    wires = [WireFormat.parse(wire) for wire in ("int8", "int4-spikes")]
    draws = [
        [bench.stress.draw(source, number, wires, bench.stress.DTYPES, 1 << 16) for number in range(300)]
        for source in (random.Random(7), random.Random(7))
    ]
    assert [str(case) for case in draws[0]] == [str(case) for case in draws[1]]
    assert {case.dtype for case in draws[0]} == {torch.bfloat16, torch.float16, torch.float32}
    assert all(case.wire.group_size <= case.elements <= 1 << 15 for case in draws[0])
    assert 0 < sum(case.bad != 0 for case in draws[0]) < 60


def test_all_specializations_are_compiled_ahead(bench):
    kinds = bench.compile_ahead.stress_inputs(2)
    form = WireFormat.parse("int8")
    chunks = [schedule(form.slice_elements(n, 2), 132, 2, 8).chunk for n, _ in kinds]
    found = {(n % 16 == 0, 2 * offset % 16 == 0, chunk) for (n, offset), chunk in zip(kinds, chunks)}
    small, large = sorted(set(chunks))
    assert found == {
        (*ends, chunk) for ends in ((True, True), (False, True), (False, False)) for chunk in (small, large)
    }


@pytest.mark.parametrize(
    "argv", [["--sizes", "1K"], ["--sizes", "x"], ["--wires", "int3"], ["--ranks", "1"], ["--link", "pigeon"]]
)
def test_bad_arguments_end_with_a_message(bench, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.allreduce.parse(argv)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_sizes(bench):
    assert [bench.allreduce.size(text) for text in ("64K", "1M", "32 MB", "65536")] == [
        1 << 16,
        1 << 20,
        1 << 25,
        1 << 16,
    ]
    assert bench.allreduce.parse(["--sizes", "1M", "64K", "1m"]).sizes == [1 << 16, 1 << 20]
    assert bench.allreduce.parse([]).sizes == [1 << power for power in range(13, 29)]


def test_a_rank_that_fails_ends_the_others(bench):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    start = time.monotonic()
    processes = [subprocess.Popen(sleeper), subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])]
    assert bench.ranks.wait(processes, 30) == 3 and processes[0].poll() is not None
    alone = [subprocess.Popen(sleeper)]
    assert bench.ranks.wait(alone, 0.1) == 124 and alone[0].poll() is not None
    assert time.monotonic() - start < 20


def test_first_token_table(bench):
    points = [
        dict(prompt=128, peer=peer, ms=ms, difference=d) for peer, ms, d in (("w4a8", 20.0, 0), ("w4a8 int4", 8.0, 0.1))
    ]
    run = bench.e2e_parallel.Run({}, "tiny", points, ["a note"])
    assert "| 128 | 20.00 | 8.00 (**2.50x**), 10.00% |" in run.table() and "- a note" in run.table()
    assert "tokens of each prompt" in run.table()
    run.decode = True
    assert "| sequences |" in run.table() and "of a decoded token" in run.table()


def test_parts_of_the_command_for_many_gpus(tmp_path):
    """Every part is a command that its own parser takes; a part that fails is told and does not stop the others."""
    modules = load(("many_gpus", "allreduce", "allreduce_sweep", "e2e_parallel"))
    names = []
    for part in modules.many_gpus.parts(4, tmp_path):
        names.append(part.name)
        script = next(
            (one for one in ("allreduce", "allreduce_sweep", "e2e_parallel") if part.command[0].endswith(f"{one}.py")),
            None,
        )
        if script:
            assert getattr(modules, script).parse(part.command[1:]).ranks == (2 if part.name == "two" else 4)
    assert names[:4] == ["stress", "tests", "times", "tune"]
    failing = modules.many_gpus.Part("failing", 20, ["-c", "print('said'); raise SystemExit(3)"])
    assert modules.many_gpus.run(failing, tmp_path, 20).startswith("exit status 3")
    assert (tmp_path / "failing.txt").read_text() == "said\n"


@pytest.mark.slow
def test_first_token_on_two_ranks(bench, tmp_path, monkeypatch):
    """Not compiled, which takes a minute, so no pass runs; and the benchmark notices that nothing is quantized."""
    pytest.importorskip("transformers")
    arguments = ["--backend", "gloo", "--model", "tiny", "--layers", "1", "--prompts", "16", "--wires", "int4"]
    command = [str(BENCHMARKS / "e2e_parallel.py"), *arguments, "--json", str(tmp_path / "run.json")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert bench.ranks.launch(2, 120) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    plain, quantized = run["points"]
    assert (plain["peer"], quantized["peer"]) == ("w4a8", "w4a8 int4") and min(plain["ms"], quantized["ms"]) > 0
    assert plain["difference"] == quantized["difference"] == 0
    assert run["notes"] == ["w4a8 int4, prompts of 16: no collective was quantized"]


def root_with_namespaces() -> bool:
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("tc") is None:
        return False
    name = f"probe{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return made


def test_slow_link_needs_root(bench, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="root"):
        bench.slow_link.main(["script.py"])


@pytest.mark.skipif(not root_with_namespaces(), reason="needs root, network namespaces and tc")
def test_slow_link(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nprint(os.environ['RANK'], os.environ['MASTER_ADDR'], os.listdir('/sys/class/net'))\n"
        "sys.exit(int(os.environ['RANK']) * 5)\n"
    )
    command = [sys.executable, "slow_link.py", "--rate", "500mbit", "--", str(script)]
    process = subprocess.Popen(command, cwd=BENCHMARKS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5 and "Mbit/s both ways" in err, err  # the rank that failed
    assert 50 < float(err.split("slow_link: ")[1].split()[0]) < 520
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"slow{process.pid}" not in left
    assert "10.203.17.1" in out
