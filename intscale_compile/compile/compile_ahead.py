"""Kernels of ours compiled in a process beside this one while Inductor compiles the rest of the graph.

Triton compiles a kernel when it is first launched. Inductor's own kernels are compiled in worker processes; those that our
ops launch would follow one after the other at the first call of the graph. Here the rewritten graph is read for the ops that
Inductor will call, their launchers are run over fake tensors to learn which kernels they would start
(:mod:`~intscale_compile.kernels.launching`), and a process (:mod:`~intscale_compile.compile.compile_worker`) compiles those into
Triton's cache on disk. Threads would not do: most of a compilation by Triton is Python, and so is Inductor.

Nothing depends on what is done here. A kernel that was not foreseen, not ready when Inductor is done, or whose compilation
failed, is compiled at its first launch as ever. Off without a GPU, where Inductor's ``compile_threads`` is 1, and with
``INTSCALE_COMPILE_AHEAD=0``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Optional

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..kernels.launching import GPU_IMPLEMENTATIONS, Launch, collected
from ..passes.base import GraphRewrite, example

log = logging.getLogger("intscale_compile")
VARIABLE = "INTSCALE_COMPILE_AHEAD"
PACKAGE = __package__.split(".")[0]
ROOT = Path(__file__).resolve().parent.parent  # of the package
# The package without what its __init__ imports (torchao, Dynamo: 3 of the 6 s that compiling a decoding step's kernels took).
START = """
import sys, types
name, folder = sys.argv[1:]
package = sys.modules[name] = types.ModuleType(name)
package.__path__ = [folder]
from intscale_compile.compile.compile_worker import main
sys.exit(main())
"""
NEVER_CALLED = {"intscale::w4a8_accumulate"}  # always the template on a GPU


class Ahead:
    """The compilations that one graph has under way.

    Attributes:
        kernels: names of the kernels that the process was given.
        ready: of those, the ones that it has compiled; known after :meth:`finish`.
        seconds: from the start of the process to the end of the last of them.
    """

    def __init__(self) -> None:
        self.kernels: tuple[str, ...] = ()
        self.ready: tuple[str, ...] = ()
        self.seconds = 0.0
        self._process: Optional[subprocess.Popen] = None
        self._output: Optional[IO[str]] = None

    def begin(self, request: dict[str, Any]) -> None:
        """Start the process; ``request`` is what ``compile_worker`` reads."""
        self.kernels = tuple(one["name"] for one in request["kernels"])
        paths = dict(PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by finish)
        with tempfile.TemporaryFile("w+") as source:
            json.dump(request | {"begun": time.time()}, source)
            source.seek(0)
            command, output = [sys.executable, "-c", START, PACKAGE, str(ROOT)], self._output
            self._process = subprocess.Popen(
                command, env=os.environ | paths, stdin=source, stdout=output, stderr=subprocess.STDOUT
            )

    def finish(self) -> None:
        """End the process, done or not, and read what it has compiled."""
        if self._process is None or self._output is None:
            return
        self._process.kill()  # nothing happens to one that has ended; Triton's cache has whole files only
        self._process.wait()
        self._output.seek(0)
        lines = [json.loads(line) for line in self._output.read().splitlines() if line.startswith("{")]
        self._output.close()
        self._process = self._output = None
        done = [line for line in lines if line["error"] is None]
        self.ready = tuple(line["name"] for line in done)
        self.seconds = max((line["seconds"] for line in done), default=0.0)
        for line in lines:
            if line["error"] is not None:
                log.warning(
                    "%s could not be compiled ahead (%s); it is compiled at its first launch",
                    line["name"],
                    line["error"],
                )


@contextlib.contextmanager
def compiling_ahead(rewrite: GraphRewrite, patches: dict[str, Any]) -> Iterator[Ahead]:
    """Compile in this context what the graph will launch; ``patches`` are the settings that Inductor compiles it with."""
    ahead = Ahead()
    with contextlib.ExitStack() as stack:
        stack.callback(ahead.finish)
        try:
            device = gpu_of(rewrite)
            if device is not None and allowed(patches):
                _use_inductors_folder(device)
                request = request_of(launches_of(rewrite, bool(_setting("triton.cudagraphs", patches))), device)
                if request["kernels"]:
                    ahead.begin(request)
        except Exception as error:
            log.warning("no kernel is compiled ahead (%s: %s)", type(error).__name__, error)
        yield ahead


def _setting(name: str, patches: dict[str, Any]) -> Any:
    # Slow to import.
    from torch._inductor import config

    return patches.get(name, config.get_config_copy()[name])


def allowed(patches: dict[str, Any]) -> bool:
    """Whether anything but this thread may compile."""
    return os.environ.get(VARIABLE) != "0" and (_setting("compile_threads", patches) or 1) > 1


def gpu_of(rewrite: GraphRewrite) -> Optional[torch.device]:
    """The GPU of the graph's first tensor on one, with its index; None where there is none."""
    values = (example(node) for node in rewrite.graph.nodes if node.op == "placeholder")
    device = next((v.device for v in values if isinstance(v, Tensor) and v.device.type == "cuda"), None)
    if device is None or not torch.cuda.is_available():
        return None
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _use_inductors_folder(device: torch.device) -> None:
    """Name Triton's cache folder as Inductor does when it loads its first kernel: it must not change in between."""
    # Slow to import.
    from torch._inductor.runtime.runtime_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index))


def launches_of(rewrite: GraphRewrite, cuda_graphs: bool) -> list[Launch]:
    """The launches of the ops that Inductor will call, in the order of the graph; equal calls are looked at once."""
    seen: set = set()
    launches: list[Launch] = []
    for node in rewrite.graph.nodes:
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        if name not in GPU_IMPLEMENTATIONS or name in NEVER_CALLED:
            continue
        arguments = _concrete(node)
        key = name, _key(arguments)
        if arguments is None or key in seen or not _is_called(name, arguments, cuda_graphs):
            continue
        seen.add(key)
        with FakeTensorMode(), torch.no_grad(), collected() as found:
            GPU_IMPLEMENTATIONS[name](*map(_fake, arguments.values()))
        launches += found
    return launches


def _concrete(node: fx.Node) -> Optional[dict[str, Any]]:
    """Arguments of a call by name, nodes replaced by their tensors; None where one has no value or size to go by."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in schema}
    given = defaults | dict(zip(defaults, node.args)) | dict(node.kwargs)
    found = {}
    for name, value in given.items():
        if isinstance(value, fx.Node):
            value = example(value)
            if value is None:
                return None
        value = _hint(value)
        if isinstance(value, Tensor) and any(_hint(size) is None for size in (*value.shape, *value.stride())):
            return None
        found[name] = value
    return found


def _hint(value: Any) -> Any:
    """A symbolic number as the number that it was in this compilation, or None."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


def _form_of(x: Tensor) -> tuple:
    return tuple(map(_hint, x.shape)), tuple(map(_hint, x.stride())), x.dtype, x.device


def _key(arguments: Optional[dict[str, Any]]) -> tuple:
    return tuple((n, _form_of(v) if isinstance(v, Tensor) else v) for n, v in (arguments or {}).items())


def _fake(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape, stride, dtype, device = _form_of(value)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _is_called(name: str, arguments: dict[str, Any], cuda_graphs: bool) -> bool:
    """Whether Inductor calls the op; linears become the template where that is faster."""
    if arguments[next(iter(arguments))].device.type != "cuda":
        return False
    if name != "intscale::w4a8_linear":
        return True
    # Imports Triton, which only GPUs need.
    from ..kernels.template import op_is_faster

    xq, qdata, scale = (arguments[key] for key in ("xq", "qdata", "scale"))
    shape, *_ = _form_of(xq)
    group_size, scale_bits, packing = (arguments[key] for key in ("group_size", "scale_bits", "packing"))
    tokens = torch.Size(shape[:-1]).numel()
    asymmetric = arguments.get("zero_point") is not None
    features, dtypes = arguments["out_features"], (qdata.dtype, scale.dtype)
    return op_is_faster(
        tokens, cuda_graphs, shape[-1], features, dtypes, group_size, scale_bits, packing, xq.device, asymmetric
    )


def request_of(launches: list[Launch], device: torch.device) -> dict[str, Any]:
    """What the process needs to know: the kernels of ``launches`` that this process has not compiled, each once."""
    # Only GPUs need Triton.
    from triton.runtime import driver

    found: dict[tuple, dict[str, str]] = {}
    with torch.cuda.device(device):
        target = driver.active.get_current_target()
        for one in launches:
            data = _specialization(one)
            if data is not None:
                name, module = one.kernel.fn.__name__, one.kernel.fn.__module__
                found.setdefault((module, name, data), dict(module=module, name=name, specialization=data))
    return dict(target=[target.backend, target.arch, target.warp_size], kernels=list(found.values()))


def _specialization(one: Launch) -> Optional[str]:
    """What Triton says it would compile for a launch (and does not); None where it has compiled it in this process."""
    # Only GPUs need Triton.
    from triton import knobs

    thread, data = threading.get_ident(), []
    before = knobs.runtime.jit_cache_hook

    def take(**call: Any) -> Any:
        if threading.get_ident() != thread:  # a launch of someone else's
            return before(**call) if before else None
        data.append(call["compile"]["specialization_data"])
        return True

    knobs.runtime.jit_cache_hook = take
    try:
        one.kernel.warmup(*one.args, grid=(1,), **one.kwargs)
    finally:
        knobs.runtime.jit_cache_hook = before
    return data[0] if data else None
