"""The report of compile times: one entry and one log line for every graph, nothing where Inductor fails."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
from torch import nn

import intscale_compile
from intscale_compile.compile import compile_ahead
from intscale_compile.compile.times import timed
from intscale_compile.debug import compile_times
from intscale_compile.passes import PASSES


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_graph_has_an_entry(caplog):
    model = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32)).requires_grad_(False)
    known = len(compile_times())
    run = torch.compile(model, backend="intscale", dynamic=False)
    with caplog.at_level(logging.INFO, "intscale_compile"):
        run(torch.randn(2, 64))
        run(torch.randn(3, 64))
        run(torch.randn(3, 64))
    first, second = compile_times()[known:]
    assert second.graph == first.graph + 1 and first.linears == second.linears == 2
    assert list(first.passes) == [p.name for p in PASSES] and all(s >= 0 for s in first.passes.values())
    assert first.inductor > 0 and first.rewriting == sum(first.passes.values())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("graph ")]
    assert str(first) in lines and str(second) in lines
    assert str(first).startswith(f"graph {first.graph}: 2 linear products, passes ")


def test_cache_hits_are_told():
    model = nn.Sequential(nn.Linear(64, 72), nn.GELU(), nn.Linear(72, 32)).requires_grad_(False)
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(model, backend="intscale")(torch.randn(2, 64))
    assert compile_times()[-1].cached and "from its cache" in str(compile_times()[-1])


def test_failure_and_explain_leave_no_entry():
    known = len(compile_times())
    with pytest.raises(RuntimeError, match="broken"), timed(1, {}):
        raise RuntimeError("broken")
    intscale_compile.explain(nn.Linear(64, 48), torch.randn(2, 64))
    assert len(compile_times()) == known


def test_kernels_compiled_meanwhile_are_in_the_entry(monkeypatch):
    """The backend compiles ahead what its graph will launch, and its entry says what that took."""
    request = dict(target=["cuda", 90, 32], kernels=[dict(module="nowhere", name="gemm_decode", specialization="")])
    monkeypatch.setenv("TRITON_CACHE_DIR", "unused")
    monkeypatch.setattr(compile_ahead, "gpu_of", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(compile_ahead, "request_of", asked := mock.Mock(return_value=request))
    model = nn.Sequential(nn.Linear(64, 80), nn.SiLU(), nn.Linear(80, 32)).requires_grad_(False)
    torch.compile(model, backend="intscale", options={"compile_threads": 2})(torch.randn(2, 64))
    entry = compile_times()[-1]
    assert (entry.kernels, entry.ready, entry.ahead) == (1, 0, 0.0) and "0 of 1 kernels ahead" in str(entry)
    monkeypatch.setenv(compile_ahead.VARIABLE, "0")
    torch._dynamo.reset()
    torch.compile(model, backend="intscale", options={"compile_threads": 2})(torch.randn(2, 64))
    assert compile_times()[-1].kernels == 0 and asked.call_count == 1
