"""What is said while something compiles: nothing for 5 seconds, then one line, and nothing that stays."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from torch import nn

from intscale_compile.compile import compile_progress
from intscale_compile.compile.compile_progress import CompileProgress
from intscale_compile.progress import WORK


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch):
    for name in ("INTSCALE_PROGRESS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compile_progress, "_bars_of_transformers", lambda: True)


def run(progress, clock):
    """A compilation of 23 seconds, looked at each second; what stderr held after 4, 6 and 20 seconds, and in the end."""
    seen = {}
    token = WORK.set("prompt of 32 tokens")
    progress.begin()
    WORK.reset(token)
    for second in range(1, 24):
        clock.now += 1
        if second == 7:
            progress.stage("Inductor", "graph 1 (7 linear products, any number of tokens)")
        if second == 12:
            progress.kernels(12, 40)
        progress.draw()
        seen[second] = sys.stderr.getvalue()
    progress.end()
    return seen | {"end": sys.stderr.getvalue()}


def test_one_line_is_rewritten_on_a_terminal_and_gone_in_the_end(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    seen = run(CompileProgress(clock, threaded=False), clock)
    assert seen[4] == "" and seen[5] == "\rcompiling prompt of 32 tokens, tracing, 5 s"
    last = seen["end"].rstrip("\r ").rpartition("\r")[2]
    what = "compiling prompt of 32 tokens: graph 1 (7 linear products, any number of tokens)"
    assert last == f"{what}, Inductor, 12 of 40 kernels, 23 s"
    assert seen["end"].endswith("\r" + " " * len(last) + "\r") and "\n" not in seen["end"]


def test_a_fast_compilation_says_nothing(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = CompileProgress(clock, threaded=False)
    progress.begin()
    clock.now += 4.9
    progress.draw()
    progress.end()
    clock.now += 60
    progress.draw()  # a thread that looks once more
    assert sys.stderr.getvalue() == ""


def test_without_a_terminal_the_log_has_a_line_now_and_then(clock, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "intscale_compile"):
        seen = run(CompileProgress(clock, threaded=False), clock)
    assert seen["end"] == ""
    assert [r.getMessage().rpartition(", ")[2] for r in caplog.records] == ["5 s", "20 s"]


def test_lines_where_they_are_asked_for(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("INTSCALE_PROGRESS", "1")
    lines = run(CompileProgress(clock, threaded=False), clock)["end"].splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == ["5 s", "20 s"]


@pytest.mark.parametrize("switch", ["INTSCALE_PROGRESS", "TQDM_DISABLE", "transformers"])
def test_it_can_be_switched_off(switch, clock, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", Terminal())
    if switch == "transformers":
        monkeypatch.setattr(compile_progress, "_bars_of_transformers", lambda: False)
    else:
        monkeypatch.setenv(switch, "0" if switch == "INTSCALE_PROGRESS" else "1")
    with caplog.at_level(logging.INFO, "intscale_compile"):
        assert run(CompileProgress(clock, threaded=False), clock)["end"] == ""
    assert not caplog.records


def test_a_closed_stderr_does_not_end_the_compilation(clock, monkeypatch):
    for stream in (Terminal(), None):
        if stream is not None:
            stream.close()
            stream.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", stream)
        progress = CompileProgress(clock, threaded=False)
        progress.begin()
        clock.now += 30
        progress.draw()
        progress.end()


def test_the_stages_of_a_compilation_of_ours(monkeypatch):
    """Dynamo says when it begins, the backend which graph it is, Inductor how many kernels it has."""
    pytest.importorskip("torch._inductor.async_compile")
    from torch._inductor import async_compile, compile_fx

    clock, seen = Clock(), []
    progress = CompileProgress(clock, threaded=False)
    monkeypatch.setattr(compile_progress, "progress", lambda: progress)

    def compile_graph(gm, inputs, config_patches=None):
        seen.append(str(progress))
        bar = async_compile.tqdm(total=3, desc="", disable=True, delay=0)
        bar.update(1)
        seen.append(str(progress))
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_graph)
    torch._dynamo.reset()
    compile_progress.watch()
    begun = []
    monkeypatch.setattr(
        progress, "begin", lambda stage="tracing", begin=progress.begin: (begun.append(stage), begin(stage))
    )
    bar = async_compile.tqdm
    model = torch.compile(nn.Linear(64, 64).requires_grad_(False), backend="intscale")
    with torch.no_grad():
        model(torch.randn(3, 64))
    assert begun == ["tracing"] and not progress.active and async_compile.tqdm is bar
    first, second = seen
    assert "(1 linear products, 3 tokens a call), Inductor, 0 s" in first
    assert second.endswith("Inductor, 1 of 3 kernels, 0 s")
    torch._dynamo.reset()
