"""Launchers compiled ahead are those that Triton asks for, each once, in other threads; a failure breaks nothing."""

from __future__ import annotations

import importlib.util
import logging
import threading
import types
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
from torch._inductor.async_compile import AsyncCompile  # noqa: E402

from intscale_compile.compile import (  # noqa: E402
    inductor_settings,  # noqa: E402
    launchers_ahead,  # noqa: E402
)
from tests.support.fake_cuda import fake_cuda, fake_inputs, generate, triton_sources  # noqa: E402

PLAIN = "@triton.jit kernel of triton_meta={'signature': {'x': '*bf16', 'XBLOCK': 'constexpr'}, 'constants': {}}"
EARLY = PLAIN.replace("'constants'", "'launch_pdl': True, 'constants'")
OTHER = EARLY.replace("*bf16", "i64")


class Broken(RuntimeError):
    pass


@pytest.fixture
def begun(monkeypatch):
    """Signatures of the launchers that are compiled, and the threads that did it; Inductor's part is left out."""
    calls: list[tuple] = []

    def launcher(source, metadata):
        if "*i1" in source.signature.values():
            raise Broken("no compiler")
        calls.append((dict(source.signature), threading.current_thread().name))

    monkeypatch.setattr(launchers_ahead, "_launcher_class", lambda: launcher)
    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda _: True))
    monkeypatch.setattr(AsyncCompile, "triton", lambda self, name, source, device_str="cuda": name)
    monkeypatch.setattr(AsyncCompile, "wait", lambda self, scope: len(calls))
    return calls


def test_one_compilation_for_each_list_of_types(begun):
    before = AsyncCompile.triton, AsyncCompile.wait
    with launchers_ahead.launchers_ahead() as ahead:
        compiler = AsyncCompile()
        for source in (EARLY, PLAIN, OTHER, EARLY.replace("*bf16", "*fp32")):
            assert compiler.triton("kernel", source, device_str="cuda") == "kernel"
        assert compiler.wait({}) == 2  # both are there before Inductor asks for its kernels
    assert (AsyncCompile.triton, AsyncCompile.wait) == before
    assert sorted(x["x"] for x, _ in begun) == ["*bf16", "i64"]
    assert all(name.startswith("intscale_launchers") for _, name in begun)
    assert sorted(ahead.compiled) == [("*", "constexpr"), ("i64", "constexpr")]
    assert not [t for t in threading.enumerate() if t.name.startswith("intscale_launchers")]


def test_a_failure_is_left_to_the_main_thread(begun, caplog):
    with caplog.at_level(logging.INFO), launchers_ahead.launchers_ahead() as ahead:
        AsyncCompile().triton("kernel", EARLY.replace("*bf16", "*i1"))
        assert AsyncCompile().wait({}) == 0
    assert ahead.compiled == [] and "a launcher could not be compiled ahead (Broken: no compiler)" in caplog.text


@pytest.mark.parametrize("reason", ["no workers", "another thread", "another Triton"])
def test_nothing_to_do(begun, monkeypatch, reason):
    with launchers_ahead.launchers_ahead() as ahead:
        call = lambda: AsyncCompile().triton("kernel", EARLY)  # noqa: E731
        if reason == "no workers":
            monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda _: False))
        elif reason == "another Triton":
            monkeypatch.setattr(launchers_ahead, "_launcher_class", lambda: None)
        if reason == "another thread":
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        else:
            call()
        AsyncCompile().wait({})
    assert begun == [] and ahead.compiled == []


def pointwise(x, index):
    return x * 2 + 1, index + 1


@pytest.mark.skipif(not inductor_settings._knows_pdl(), reason="this torch has no such code generation")
@pytest.mark.skipif(launchers_ahead._launcher_class() is None, reason="this Triton generates no launchers")
def test_the_source_is_the_one_that_triton_compiles_for_the_kernel(monkeypatch, tmp_path):
    """Triton's cache is keyed by this source: the main thread finds what was compiled here."""
    from torch._inductor.runtime import triton_helpers
    from triton.backends.nvidia import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sources: list[str] = []
    module = types.SimpleNamespace(launch=None)
    monkeypatch.setattr(driver, "library_dirs", lambda: [])
    monkeypatch.setattr(driver, "compile_module_from_src", lambda src, **_: sources.append(src) or module)
    tensors, mode = fake_inputs([((4, 1000), torch.bfloat16), ((7,), torch.int64)])
    with fake_cuda():
        patches = inductor_settings.inductor_defaults(tensors)
    code = generate(pointwise, tensors, mode, **patches)
    with fake_cuda(), mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        for name, source in triton_sources(code).items():
            path = tmp_path / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            spec.loader.exec_module(kernel := importlib.util.module_from_spec(spec))
            tuner = getattr(kernel, name)
            compiled = tuner._precompile_config(tuner.configs[0]).kernel
            assert compiled.metadata.launch_pdl
            driver.CudaLauncher(compiled.src, compiled.metadata)
            ahead = launchers_ahead.LaunchersAhead()
            ahead.begin(source)
            ahead.wait()
            ahead.finish()
            assert len(ahead.compiled) == 1
            pointers = {name: "*i8" if kind[0] == "*" else kind for name, kind in compiled.src.signature.items()}
            assert driver.make_launcher({}, pointers, None) == sources[-1]  # whatever they point to
    assert len(sources) >= 2 and sources[::2] == sources[1::2]
    assert all("cuLaunchKernelEx" in source for source in sources)
