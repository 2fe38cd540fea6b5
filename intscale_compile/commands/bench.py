"""Quick timings of one product, ours against PyTorch's own, on this machine."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..config import IntScaleConfig
from ..errors import CompileError, ConfigError
from ..kernels.tile_timing import GpuBench, Shape, replay_ms

GPU_SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))  # Llama 3 8B
CPU_SHAPES = ((4096, 4096),)
GPU_TOKENS, CPU_TOKENS = (1, 16, 64, 256, 1024), (1, 16, 256)
REPLAYS, LEAST_TURNS, WARM_UP = 15, 8, 3
LEAST_SQNR = 10.0  # dB: a product that is further from the original is wrong, not fast


@dataclass(frozen=True)
class GemmTiming:
    """Medians of one product; both sides took turns in one run.

    Attributes:
        n, k, tokens: output features, input features, rows of the activation.
        ours_us: microseconds of W4A8.
        reference_us: microseconds of PyTorch's linear.
        reference: what that is: ``"bf16"`` on a GPU, ``"fp32"`` on a CPU.
        kernel: what ran ours.
    """

    n: int
    k: int
    tokens: int
    ours_us: float
    reference_us: float
    reference: str
    kernel: str

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.reference_us / self.ours_us

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def parse_shape(text: str) -> tuple[int, int]:
    """``"28672x4096"`` as output and input features.

    Raises:
        ConfigError: it is not of that form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"{text!r} is not a shape: write output x input features, such as 28672x4096.")
    return int(match[1]), int(match[2])


def bench_gemms(
    shapes: Sequence[tuple[int, int]] = (),
    tokens: Sequence[int] = (),
    config: Optional[IntScaleConfig] = None,
    *,
    device: Optional[str] = None,
    seconds: float = 1.0,
) -> Iterator[GemmTiming]:
    """Time products of random matrices, one after the other.

    On a GPU the bare product is timed, activations quantized before, in CUDA graphs over copies of the weight that exceed the
    L2 cache together, against bf16. On a CPU compiled linear layers are timed, activation quantization included, against fp32.
    The output of ours is checked before it is timed.

    Args:
        shapes: output and input features; the default is Llama 3 8B's on a GPU, 4096 x 4096 on a CPU.
        tokens: rows of the activation.
        config: format of the weights.
        device: ``"cpu"`` or ``"cuda"``; the default is a GPU where there is one.
        seconds: for each product, on a CPU.

    Raises:
        ConfigError: a number is not positive, or there is no GPU.
        CompileError: the output of ours is wrong here.
    """
    gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    shapes, tokens = products(shapes, tokens, gpu)
    if min(tokens) < 1:
        raise ConfigError(f"--tokens {min(tokens)} is not supported: use 1 or more.")
    config = config or IntScaleConfig()
    if gpu:
        yield from _on_gpu(shapes, tokens, config)
    else:
        for n, k in shapes:
            for m in tokens:
                yield _on_cpu(n, k, m, config, seconds)


def products(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], gpu: bool
) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
    """Shapes and tokens, with the defaults of the device where there are none."""
    return shapes or (GPU_SHAPES if gpu else CPU_SHAPES), tokens or (GPU_TOKENS if gpu else CPU_TOKENS)


def _on_cpu(n: int, k: int, m: int, config: IntScaleConfig, seconds: float) -> GemmTiming:
    torch._dynamo.reset()
    linear, x = nn.Linear(k, n, bias=False).requires_grad_(False), torch.randn(m, k)
    nn.init.normal_(linear.weight, std=k**-0.5)
    fp32 = torch.compile(linear, fullgraph=True)
    w4a8 = torch.compile(linear, backend="intscale", fullgraph=True, options={"intscale.config": config})
    with torch.no_grad():
        _check(fp32(x), w4a8(x), f"{n}x{k} with {m} tokens")
        ours, reference = _alternate([lambda: w4a8(x), lambda: fp32(x)], seconds)
    return GemmTiming(n, k, m, ours * 1e6, reference * 1e6, "fp32", "oneDNN")


def _check(reference: Tensor, ours: Tensor, what: str) -> None:
    """Raise ``CompileError`` where two outputs have little to do with each other."""
    error = (reference.double() - ours.double()).square().mean()
    sqnr = float(10 * torch.log10(reference.double().square().mean() / error))
    if not sqnr > LEAST_SQNR:
        raise CompileError(f"{what}: the output is {sqnr:.1f} dB from the original's; see intscale doctor.")


def _alternate(functions: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Median seconds of each function; they take turns."""
    for _ in range(WARM_UP):
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < LEAST_TURNS:
        for function, taken in zip(functions, times):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def _on_gpu(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], config: IntScaleConfig) -> Iterator[GemmTiming]:
    # Imports Triton, which only GPUs need.
    from ..kernels.triton_gemm import gluon_obstacle, pick_tile

    bench, form = GpuBench(), (config.effective_group_size, config.scale_bits, config.weight_bits)
    try:
        for n, k in shapes:
            weights: list[Tensor] = []
            gluon = gluon_obstacle(k, *form, "tiled", bench.device) is None
            for m in tokens:
                shape = Shape(n, k, *form)
                bench.load(shape, m)
                tile = pick_tile(m, n, k, *form, bench.device, gluon)
                if fault := bench.fault(tile):
                    raise CompileError(f"{n}x{k} with {m} tokens, {tile.kernel}: {fault}; see intscale doctor.")
                weights = weights or _copies(n, k, bench.device)
                ours, reference = _in_graphs(bench, tile, m, weights)
                name = "triton" if tile.kernel == "triton" else f"gluon {tile.kernel}"
                yield GemmTiming(n, k, m, ours, reference, "bf16", name)
    finally:
        bench.close()


def _copies(n: int, k: int, device: torch.device) -> list[Tensor]:
    """A random bf16 weight as often as it takes to exceed the L2 cache twice."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, 2 * l2 // (2 * n * k) + 1)
    return [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(count)]


def _in_graphs(bench: GpuBench, tile: Any, m: int, weights: list[Tensor]) -> tuple[float, float]:
    """Median microseconds of one product of ours and of bf16, replays of both in turn."""
    problem = bench._loaded()
    x = torch.randn(m, weights[0].shape[1], device=bench.device, dtype=torch.bfloat16)
    ours = [lambda c=c: problem.linear(tile, c) for c in range(len(problem.weights))]
    theirs = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
    graphs = [_graph(calls) for calls in (ours, theirs)]
    samples: list[list[float]] = [[], []]
    for turn in range(REPLAYS + 1):
        for graph, taken in zip(graphs, samples):
            ms = replay_ms(graph)
            if turn:  # the first one warms up
                taken.append(ms)
    medians = [statistics.median(taken) * 1e3 / len(calls) for taken, calls in zip(samples, (ours, theirs))]
    return medians[0], medians[1]


def _graph(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """All calls in one CUDA graph; what is compiled at a first launch is compiled before."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
