"""Progress of quantize_: silent when fast, a bar on a terminal, log lines elsewhere, one summary."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, progress

QUICK = IntScaleConfig(scale_search="absmax")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def model():
    return nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)]).requires_grad_(False)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", -1.0)
    monkeypatch.setattr(progress, "LOG_SECONDS", -1.0)


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("quantize_")]


def test_fast_call_says_one_line(caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO, "intscale_compile"):
        quantize_(model(), QUICK)
    assert sys.stderr.getvalue() == ""
    (line,) = messages(caplog)
    assert line.startswith("quantize_: 4 weights, 0.1 MB to 0.0 MB, ")


def test_bar_on_a_terminal(slow, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    quantize_(model(), QUICK)
    assert "quantize_" in sys.stderr.getvalue() and "B/s" in sys.stderr.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_log_lines_where_no_bar_can_be(terminal, slow, caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    if terminal:  # tqdm is not installed
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with caplog.at_level(logging.INFO, "intscale_compile"):
        quantize_(model(), QUICK)
    lines = messages(caplog)
    assert len(lines) == 4 and lines[1].startswith("quantize_: 2 of 4 weights") and lines[1].endswith("last 1.weight")
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("ours", [True, False])
def test_bar_is_closed_when_the_call_fails(ours, slow, monkeypatch):
    tqdm = pytest.importorskip("tqdm.auto").tqdm
    monkeypatch.setattr(sys, "stderr", Terminal())
    closed = []
    monkeypatch.setattr(tqdm, "close", lambda self, close=tqdm.close: closed.append(1) or close(self))
    broken = model()
    if ours:  # found in the proof only, when others were changed already
        broken[3] = nn.Linear(64, 64, bias=False).requires_grad_(False)
        broken[3].weight.mul_(1e6)
        with pytest.raises(ValueError, match="amplifier"):
            quantize_(broken, IntScaleConfig(amplifier=1024, scale_search="absmax"))
    else:
        original = progress.Progress.add

        def add(self, name, before, after):
            original(self, name, before, after)
            if name == "2.weight":
                raise KeyboardInterrupt

        monkeypatch.setattr(progress.Progress, "add", add)
        with pytest.raises(KeyboardInterrupt):
            quantize_(broken, QUICK)
    assert closed and torch.is_tensor(broken[3].weight)
