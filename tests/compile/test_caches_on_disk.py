"""Inductor's and Triton's caches on disk hit across processes, and never with other sources."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.support import forks

SCRIPT = textwrap.dedent(
    """
    import torch, torch._inductor.config, intscale_compile, sys
    from torch._dynamo.utils import counters
    torch.manual_seed(0)
    torch._inductor.config.fallback_by_default = True  # no C++: its compiler has no part in this
    m = torch.nn.Linear(64, 48).requires_grad_(False)
    x = torch.randn(4, 64)
    y = torch.compile(m, backend="intscale")(x)
    hits = [counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]]
    m.weight = torch.nn.Parameter(intscale_compile.IntScaleTensor.from_hp(m.weight.data), requires_grad=False)
    y = y + torch.compile(m)(x)  # plain Inductor: our op is not in Dynamo's graph
    hits += [counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"] - hits[0]]
    print("RESULT", *hits, y.double().sum().item().hex())
    """
)


# As if a source file had other contents. In a fork the number is read already: every module that has it gets another.
CHANGED_IN_FORK = textwrap.dedent(
    """
    import intscale_compile, sys
    having = [m for n, m in sys.modules.items() if n.startswith("intscale_compile.") and hasattr(m, "KERNEL_ABI")]
    assert len({module.KERNEL_ABI for module in having}) == 1 and len(having) > 8
    for module in having:
        module.KERNEL_ABI += 1
    """
)
CHANGED = textwrap.dedent(
    """
    import importlib.util, sys, hashlib
    real = hashlib.sha256
    hashlib.sha256 = lambda data=b"", **k: real(data + b"7", **k)
    import intscale_compile
    hashlib.sha256 = real
    """
)


def _run(cache, before="", fork=True):
    """Hits of our backend, those of plain Inductor and the result in another process."""
    if fork:
        script = cache / "script.py"
        script.write_text(before + SCRIPT)
        out = forks.run("plain", script, timeout=300, TORCHINDUCTOR_CACHE_DIR=str(cache))
    else:
        command = [sys.executable, "-c", before + SCRIPT]
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    _, *hits, value = next(line for line in out.stdout.splitlines() if line.startswith("RESULT")).split()
    return [int(count) for count in hits], value


@pytest.mark.parametrize("fork", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fork", "new process"])
def test_caches_hit_across_processes_and_never_with_other_sources(tmp_path, fork):
    cold, warm = _run(tmp_path), _run(tmp_path)
    changed = _run(tmp_path, CHANGED_IN_FORK) if fork else _run(tmp_path, CHANGED, fork=False)
    assert cold[0] == changed[0] == [0, 0] and min(warm[0]) >= 1
    assert cold[1] == warm[1] == changed[1]


@pytest.mark.slow
def test_tables_that_inductor_copied_before_us_do_not_matter(tmp_path):
    """transformers may import torch.distributed.tensor.debug, which reads Inductor's decompositions at its import."""
    before = "from torch._inductor.decomposition import select_decomp_table as t; t()\n"
    after = "from intscale_compile.kernels.quantize_per_token import OP\nassert OP in t()"
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", before + SCRIPT + after], env=env, capture_output=True, text=True, check=True)
