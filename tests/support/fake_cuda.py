"""Run Inductor's code generation for a CUDA device that is not there; nothing is executed.

``generate(fn, *fake_inputs(...))`` traces ``fn`` over fake CUDA tensors, runs Inductor's own passes, lowers and returns
the module's source. What is patched is every place where Inductor or Triton would ask the driver about the device.
"""

from __future__ import annotations

import contextlib
import re
import types
import unittest.mock
from collections.abc import Callable, Iterator, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

H100 = types.SimpleNamespace(
    name="fake H100",
    major=9,
    minor=0,
    gcnArchName="",
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)


class _Driver:
    """What Triton's runtime wants to know about the active device."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}
    )

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Make torch and triton believe that device 0 is an H100."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties

    answers = {
        "torch.cuda.is_available": True,
        "torch.cuda.is_initialized": True,
        "torch.cuda._lazy_init": None,
        "torch.cuda.synchronize": None,
        "torch.cuda.device_count": 1,
        "torch.cuda.current_device": 0,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.get_device_properties": H100,
        "torch.cuda._exchange_device": 0,
        "torch.cuda._maybe_exchange_device": 0,
        "torch._C._cuda_getCurrentRawStream": 0,
        "torch._C._cuda_getDevice": 0,
        "torch._C._cuda_setDevice": 0,
        "torch._C._cuda_exchangeDevice": 0,
        "torch._C._cuda_maybeExchangeDevice": 0,
        "torch.utils._triton.has_triton": True,
        "torch.utils._triton.has_triton_package": True,
        "torch._inductor.scheduler.has_triton": True,
    }
    interface_answers = {"is_available": True, "get_compute_capability": 90}
    worker_answers = {"get_device_properties": H100, "current_device": 0}
    patch = unittest.mock.patch
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(patch(name, lambda *_, _value=value, **__: _value, create=True))
        for owner, known in (
            (CudaInterface, interface_answers | worker_answers),
            (CudaInterface.Worker, worker_answers),
        ):
            for name, value in known.items():
                answer = staticmethod(lambda *_, _value=value, **__: _value)
                stack.enter_context(patch.object(owner, name, answer, create=True))
        stack.enter_context(patch.object(triton.runtime.driver, "_active", _Driver(), create=True))
        forget = getattr(DeviceProperties.create, "cache_clear", lambda: None)
        stack.callback(forget)
        forget()
        yield


def fake_inputs(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], dynamic_rows: bool = False):
    """Fake CUDA tensors, and their mode; with ``dynamic_rows`` dimension 0 of the first one is symbolic."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic_rows else None, allow_non_fake_inputs=True)
    shapes = [(list(shape), dtype) for shape, dtype in shapes]
    if dynamic_rows:
        meta = torch.empty(shapes[0][0], device="meta")
        sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (meta.dim() - 1)
        symbolic = mode.from_tensor(meta, source=ConstantSource("x"), symbolic_context=StatelessSymbolicContext(sizes))
        shapes[0][0][0] = symbolic.shape[0]
    with mode:
        return [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in shapes], mode


def generate(fn: Callable, tensors: Sequence[torch.Tensor], mode: FakeTensorMode, **patches) -> str:
    """Source of the module that Inductor generates for ``fn(*tensors)``; ``patches`` are Inductor settings."""
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    # These register patterns by tracing small real functions: before the real driver is patched away.
    joint_graph.lazy_init(None)
    try:
        post_grad.lazy_init()
    except TypeError:  # some releases require the argument
        post_grad.lazy_init(None)
    # Constant folding would execute operators on the absent device.
    patches = {"joint_graph_constant_folding": False, **patches}
    with fake_cuda(), mode, torch.no_grad(), config.patch(patches):
        graph_module = make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="real")(*tensors)
        with V.set_fake_mode(mode):
            graph_module = _recursive_joint_graph_passes(graph_module) or graph_module
            _recursive_post_grad_passes(graph_module, is_inference=True)
            post_grad.view_to_reshape(graph_module)
            graph = GraphLowering(graph_module, is_inference=True, shape_env=mode.shape_env)
            with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
                graph.run(*tensors)
                code, *_ = graph.codegen()
    return getattr(code, "value", code)


def triton_sources(code: str) -> dict[str, str]:
    """Source of every Triton kernel in a generated module, by kernel name, in order of appearance."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S))


def load_kernel(name: str, source: str, directory) -> tuple[object, dict]:
    """Import one generated kernel without its launcher: the ``triton.jit`` function and the heuristic's arguments."""
    import importlib.util

    import torch._inductor.runtime.triton_helpers as helpers

    found = {}

    def heuristic(kind):
        def decorator(*_, **arguments):
            def keep(function):
                found.update(function=function, arguments=dict(arguments, kind=kind))
                return function

            return keep

        return decorator

    path = directory / f"{name}.py"
    path.write_text(re.sub(r"triton_heuristics\.(\w+)\(", r"_heuristic('\1')(", source))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    module._heuristic = heuristic
    with unittest.mock.patch.object(helpers, "set_driver_to_gpu", lambda: None):
        spec.loader.exec_module(module)
    return found["function"], found["arguments"]
