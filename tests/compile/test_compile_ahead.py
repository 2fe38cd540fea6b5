"""Kernels compiled ahead are those that the launchers look for; a failure breaks nothing; no thread is left.

Without a GPU: graphs over fake CUDA tensors, a driver that is not there, and launches whose last step is left out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import types
from unittest import mock

import pytest
import torch
from torch import fx

triton = pytest.importorskip("triton")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from intscale_compile import format as fmt  # noqa: E402
from intscale_compile import ops  # noqa: E402
from intscale_compile.compile import compile_ahead  # noqa: E402
from intscale_compile.compile.times import CompileTime, timed  # noqa: E402
from intscale_compile.kernels import gluon_launch, triton_attention, triton_gemm  # noqa: E402
from intscale_compile.kernels.launching import GPU_IMPLEMENTATIONS, collected, launch  # noqa: E402
from tests.support.fake_cuda import fake_cuda  # noqa: E402

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
gluon = pytest.mark.skipif(RELEASE not in gluon_launch.TRITON_RELEASES, reason=f"Gluon of Triton {triton.__version__}")
H100 = "NVIDIA H100 80GB HBM3"
DEVICE = torch.device("cuda", 0)
I8, U8, F32, BF16 = torch.int8, torch.uint8, torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def machine():
    """An H100 that is not there."""
    ops.register_inductor()
    cached = (
        gluon_launch.sm_count,
        gluon_launch.missing_feature,
        triton_gemm.device_name,
        triton_attention._can_overlap,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_cuda())
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda _: None, create=True))
        for name, value in {
            "triton_gemm.capability": 90,
            "triton_gemm.device_name": H100,
            "triton_gemm.use_ptx": True,
            "triton_gated.use_ptx": True,
            "triton_grouped.use_ptx": True,
            "triton_grouped.capability": 90,
            "gluon_launch.sm_count": 132,
            "triton_attention._can_overlap": True,
            "w4a8_grouped.check_grouped_operands": None,  # indexing a fake CUDA tensor would ask the driver
        }.items():
            answer = mock.patch(f"intscale_compile.kernels.{name}", lambda *_, _value=value: _value)
            stack.enter_context(answer)
        yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def started(monkeypatch):
    """Launches end before the GPU would be asked; the names of the kernels that would have run."""
    from triton.compiler.compiler import CompiledKernel

    names: list[str] = []
    run = property(lambda self: lambda *_, **__: names.append(self.name))
    monkeypatch.setattr(CompiledKernel, "run", run)
    monkeypatch.setattr(CompiledKernel, "launch_metadata", lambda *_: None)
    return names


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Names of the kernels that Triton compiles and does not find in a cache; there is nothing in them."""
    names: list[str] = []

    def listen(*, src, cache_hit, **_):
        if not cache_hit:
            names.append(src.name)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    touched = []
    yield names, touched
    for kernel in touched:
        kernel.device_caches.clear()


def weight(n: int, k: int, group_size: int = 128):
    rows, groups = fmt.padded_out_features(n), fmt.num_groups(k, group_size)
    return ((rows, fmt.padded_in_features(k, group_size) // 2), U8), ((rows, groups), U8), ((n, 1), F32)


def linear_case(m: int, n: int, k: int, group_size: int = 128, overlap: bool = True):
    shapes = [((1, m, k), I8), ((1, m, 1), F32), *weight(n, k, group_size)]
    rest = (None, n, group_size, 4, "tiled", BF16, ops.KERNEL_ABI, None, overlap)
    return "intscale::w4a8_linear", shapes, rest


def gated_case(m: int, half: int, k: int):
    shapes = [((m, k), I8), ((m, 1), F32), *weight(2 * half, k)]
    return "intscale::w4a8_gated_linear", shapes, (None, "silu", 2 * half, 128, 4, "tiled", BF16, ops.KERNEL_ABI, True)


def attention_case(batch: int, keys: int):
    cache = ((batch, 2, keys, 128), BF16)
    shapes = [((batch, 8, 1, 128), BF16), cache, cache, ((batch, 1, 1, keys), torch.bool)]
    return "intscale::decode_attention", shapes, (0.088, ops.KERNEL_ABI, False)


def hadamard_case(m: int, k: int):
    return "intscale::hadamard_quantize", [((m, k), BF16)], (128, None)


def grouped_case(rows: int, n: int, k: int):
    shapes = [((rows, k), I8), ((rows, 1), F32), *(((4, *shape), dtype) for shape, dtype in weight(n, k))]
    shapes.append(((4,), torch.int32))
    return "intscale::w4a8_grouped_linear", shapes, (n, 128, 4, "tiled", BF16, ops.KERNEL_ABI)


def graph_of(*cases) -> types.SimpleNamespace:
    """A graph that calls the ops of ``cases``, each with inputs of its own, as the passes leave it."""
    graph, inputs, results = fx.Graph(), [], []
    with FakeTensorMode():
        for name, shapes, rest in cases:
            nodes = []
            for shape, dtype in shapes:
                nodes.append(graph.placeholder(f"x{len(inputs)}"))
                inputs.append(nodes[-1])
                nodes[-1].meta["example_value"] = torch.empty(shape, dtype=dtype, device=DEVICE)
            if name == "intscale::w4a8_grouped_linear":
                offsets = nodes.pop()
                nodes += [None, offsets]
            op = getattr(torch.ops.intscale, name.split("::")[1]).default
            results.append(graph.call_function(op, (*nodes, *rest)))
    graph.output(tuple(results))
    return types.SimpleNamespace(graph=graph)


def call_for_real(case) -> None:
    """What the op does on a GPU, with tensors in memory."""
    name, shapes, rest = case
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]
    if name == "intscale::w4a8_grouped_linear":
        tensors = [*tensors[:-1], None, tensors[-1]]
    counters = mock.patch.object(gluon_launch, "take_counters", lambda _, count: torch.zeros(count, dtype=torch.int32))
    with counters:
        GPU_IMPLEMENTATIONS[name](*tensors, *rest)


def check_foreseen(cases, names, started, compiled):
    """The process compiles these kernels; the calls then start the same ones and compile nothing."""
    counts, touched = compiled
    rewrite = graph_of(*cases)
    launches = compile_ahead.launches_of(rewrite, cuda_graphs=True)
    touched += [one.kernel for one in launches]
    for kernel in touched:
        kernel.device_caches.clear()
    with compile_ahead.compiling_ahead(rewrite, {"compile_threads": 4, "triton.cudagraphs": True}) as ahead:
        assert ahead.kernels == tuple(names)
        ahead._process.wait(timeout=200)
    assert ahead.ready == ahead.kernels and ahead.seconds > 0
    for case in cases:
        call_for_real(case)
    assert len(started) == len(cases) and set(started) == set(names)
    assert not counts
    again = compile_ahead.request_of(launches, DEVICE)
    assert again["kernels"] == []  # what this process has is not compiled once more


@gluon
def test_every_kind_of_kernel_is_what_was_compiled_ahead(started, compiled):
    """Decoding, with attention; prefill; and a part of K, which has counters and partial sums."""
    cases = [linear_case(1, 4096, 4096), attention_case(1, 256)]
    # 29 blocks of K are one in a loop's body, which compiles the fastest. Two layers have one tile and one K: one kernel.
    cases += [gated_case(100, 14336, 3712)]
    cases += [linear_case(64, 4096, 14336, overlap=False), linear_case(64, 3584, 14336, overlap=False)]
    names = ["gemm_decode", "decode_attention_kernel", "gemm_cooperative", "gemm_specialized"]
    check_foreseen(cases, names, started, compiled)


@pytest.mark.slow
@gluon
def test_decoding_launches_what_was_compiled_ahead(started, compiled):
    cases = [linear_case(1, n, k) for n, k in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]]
    check_foreseen(cases, ["gemm_decode", "gemm_decode", "gemm_specialized", "gemm_decode"], started, compiled)


@pytest.mark.slow
@gluon
def test_prefill_launches_what_was_compiled_ahead(started, compiled):
    """q/k/v and output projection have one tile and one K: one kernel. The gated one is another form of it."""
    cases = [linear_case(2048, 6144, 3712), linear_case(2048, 4096, 3712), gated_case(2048, 14336, 3712)]
    check_foreseen(cases, ["gemm_cooperative", "gemm_cooperative"], started, compiled)


@pytest.mark.slow
def test_plain_kernels_launch_what_was_compiled_ahead(started, compiled):
    cases = [gated_case(3, 96, 256), attention_case(3, 4096), hadamard_case(5, 384), grouped_case(32, 128, 256)]
    names = ["w4a8_gated_kernel", "decode_attention_kernel", "hadamard_quantize_kernel", "w4a8_grouped_kernel"]
    check_foreseen(cases, names, started, compiled)


@gluon
def test_only_ops_that_inductor_calls():
    """The template has no kernel of ours: few tokens without CUDA graphs, features without a Gluon kernel, int32 results."""
    few, many, half_block = linear_case(64, 512, 256), linear_case(4096, 512, 256), linear_case(64, 512, 192, 64)
    _, shapes, _ = few
    bare = "intscale::w4a8_accumulate", [shapes[0], *shapes[2:4]], (512, 128, 4, "tiled", ops.KERNEL_ABI)
    rewrite = graph_of(few, many, half_block, bare)
    without = compile_ahead.launches_of(rewrite, cuda_graphs=False)
    assert [(one.kernel.fn.__name__, one.args[0].shape) for one in without] == [("gemm_specialized", [4096, 256])]
    assert len(compile_ahead.launches_of(rewrite, cuda_graphs=True)) == 2


def test_many_equal_layers_are_looked_at_once():
    rewrite = graph_of(*[gated_case(3, 96, 256)] * 40)
    with mock.patch.dict(GPU_IMPLEMENTATIONS):
        name = "intscale::w4a8_gated_linear"
        GPU_IMPLEMENTATIONS[name] = mock.Mock(wraps=GPU_IMPLEMENTATIONS[name])
        assert len(compile_ahead.launches_of(rewrite, True)) == 1
        assert GPU_IMPLEMENTATIONS[name].call_count == 1


def test_a_symbolic_number_of_tokens_is_that_of_this_compilation():
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    rewrite = graph_of(gated_case(3, 96, 256))
    first = next(iter(rewrite.graph.nodes))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    meta = torch.empty(3, 256, dtype=I8, device="meta")
    symbolic = mode.from_tensor(meta, source=ConstantSource("x"), symbolic_context=context)
    with mode:
        first.meta["example_value"] = torch.empty(symbolic.shape, dtype=I8, device=DEVICE)
    assert not isinstance(first.meta["example_value"].shape[0], int)
    (one,) = compile_ahead.launches_of(rewrite, True)
    assert one.args[8:11] == (3, 192, 256)


class Broken(RuntimeError):
    pass


def test_failures_are_logged_and_end_nothing(caplog, monkeypatch, tmp_path):
    rewrite, patches = graph_of(gated_case(3, 96, 256)), {"compile_threads": 4}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    request = dict(
        target=["cuda", 90, 32], kernels=[dict(module="intscale_compile.nowhere", name="x", specialization="")]
    )
    answer = mock.patch.object(compile_ahead, "request_of", return_value=request)
    with answer, caplog.at_level(logging.WARNING), compile_ahead.compiling_ahead(rewrite, patches) as ahead:
        ahead._process.wait(timeout=200)
    assert ahead.ready == () and ahead.seconds == 0.0
    assert "x could not be compiled ahead (ModuleNotFoundError" in caplog.text
    failing = mock.patch.object(compile_ahead, "launches_of", side_effect=Broken("odd graph"))
    with failing, caplog.at_level(logging.WARNING), compile_ahead.compiling_ahead(rewrite, patches) as ahead:
        assert ahead.kernels == ()
    assert "no kernel is compiled ahead (Broken: odd graph)" in caplog.text


def test_the_process_ends_with_the_compilation_of_the_graph(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rewrite = graph_of(gated_case(3, 96, 256))
    with pytest.raises(Broken), compile_ahead.compiling_ahead(rewrite, {"compile_threads": 4}) as ahead:
        process = ahead._process
        assert process.poll() is None
        raise Broken
    assert process.poll() is not None and ahead.ready == ()


def test_the_process_imports_no_more_than_the_kernels(tmp_path):
    """torchao and Dynamo, which the package imports, took half of the time in which a decoding step's kernels compile."""
    kernel = dict(module="intscale_compile.kernels.gluon_decode", name="gemm_decode", specialization="{}")
    request = dict(target=["cuda", 90, 32], kernels=[kernel], begun=0.0)
    folder = str(compile_ahead.ROOT)
    command = [sys.executable, "-X", "importtime", "-c", compile_ahead.START, compile_ahead.PACKAGE, folder]
    done = subprocess.run(command, cwd=tmp_path, input=json.dumps(request), capture_output=True, text=True, timeout=200)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "intscale_compile.kernels.gluon_common" in imported, done.stderr
    assert not imported & {
        "torchao",
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "transformers",
        "intscale_compile.ops",
    }
    assert json.loads(done.stdout)["error"] == "KeyError: 'name'"  # of the specialization: the kernel is there


def test_launches_of_other_threads_are_compiled_while_this_one_only_asks():
    """Triton's hook is global: a kernel that another thread launches meanwhile is not held back."""
    seen = []
    (one,) = compile_ahead.launches_of(graph_of(gated_case(3, 96, 256)), True)

    class Asking:
        def warmup(self, *_, **__):
            hook = triton.knobs.runtime.jit_cache_hook
            other = threading.Thread(target=lambda: seen.append(hook(compile={"specialization_data": "theirs"})))
            other.start()
            other.join()
            assert hook(compile={"specialization_data": "ours"}) is True

    assert compile_ahead._specialization(types.SimpleNamespace(kernel=Asking(), args=(), kwargs={})) == "ours"
    assert seen == [None] and triton.knobs.runtime.jit_cache_hook is None


@pytest.mark.parametrize("reason", ["variable", "threads", "cpu", "absent"])
def test_off(monkeypatch, reason):
    rewrite, patches = graph_of(gated_case(3, 96, 256)), {"compile_threads": 4}
    if reason == "variable":
        monkeypatch.setenv(compile_ahead.VARIABLE, "0")
    elif reason == "threads":
        patches["compile_threads"] = 1
    elif reason == "absent":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        for node in rewrite.graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = torch.empty(1)
    with compile_ahead.compiling_ahead(rewrite, patches) as ahead:
        assert ahead.kernels == () and ahead._process is None
    assert ahead.seconds == 0.0


def test_launches_start_again_after_collecting():
    kernel = mock.MagicMock()
    with pytest.raises(Broken), collected() as found:
        launch(kernel, (1,), 3)
        raise Broken
    assert len(found) == 1 and not kernel.mock_calls
    launch(kernel, (1,), 3, num_warps=4)
    kernel.__getitem__.assert_called_once_with((1,))
    kernel.__getitem__.return_value.assert_called_once_with(3, num_warps=4)


def test_the_report_says_what_it_took():
    from intscale_compile.debug import compile_times

    ahead = compile_ahead.Ahead()
    ahead.kernels, ahead.ready, ahead.seconds = ("gemm_decode",) * 5, ("gemm_decode",) * 4, 3.21
    with timed(4, {}, ahead):
        pass
    entry = compile_times()[-1]
    assert (entry.kernels, entry.ready, entry.ahead) == (5, 4, 3.21)
    assert str(entry).endswith(", 4 of 5 kernels ahead in 3.2 s")
    assert "ahead" not in str(CompileTime(1, 2, {}, 1.0, False))
