"""One peer in a process of its own: build, quantize, compile, and time its points when its turn comes.

All processes compile a point side by side, meet, and time one after the other, so that nothing else uses the GPU then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

PROMPT = 128  # tokens in the cache before decoding begins, unless a point says more
ROOM = 128  # tokens that the cache can take then
ROUNDS = 7  # the median of so many means
STEPS = {"decode": 8, "prefill": 2}  # calls in each mean
LATE = "not timed: --budget was over"
ALONE = "timed out of step with the other processes, since one of them died"


@dataclass(frozen=True)
class Point:
    """``decode`` of one token at a batch size behind ``context`` tokens, or ``prefill`` of a number of tokens."""

    kind: str
    size: int
    context: int = PROMPT

    @property
    def name(self) -> str:
        """Such as ``decode 16``, or ``decode 16 behind 8192``."""
        return f"{self.kind} {self.size}" + (f" behind {self.context}" if self.context != PROMPT else "")


@dataclass
class PeerResult:
    """What a peer measured until now; times in microseconds, memory in bytes."""

    peer: str
    quantize_s: float = 0.0
    build_s: float = 0.0
    weights_bytes: int = 0
    quantized_fraction: float = 0.0
    times_us: dict[str, float] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, list] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass
class Turns:
    """Keeps the processes in step.

    Attributes:
        meeting: barrier of all processes.
        gpu: lock.
        died: event, set when one of them died, which breaks the barrier: the others go on out of step.
        deadline: Unix time after which no point is begun.
    """

    meeting: Any
    gpu: Any
    died: Any
    deadline: float

    def meet(self) -> bool:
        """Wait until all processes have come here; whether to go on. Not when time is over: others may still use the GPU."""
        try:
            self.meeting.wait(timeout=max(0.0, self.deadline - time.time()))
        except threading.BrokenBarrierError:
            return self.died.is_set()
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The GPU for this process only."""
        with self.gpu:
            yield


def run_peer(
    peer_name: str,
    model_name: str,
    layers: int | None,
    points: list[Point],
    device: str,
    turns: Turns,
    results: Any,
    skip_guards: bool = False,
) -> None:
    """Entry of the process: after each of ``points``, puts its :class:`PeerResult` and whether that was all into ``results``."""
    folder = tempfile.mkdtemp(prefix=f"e2e_{peer_name}_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = folder  # compile times without old caches
    result = PeerResult(peer_name)
    try:
        _measure(result, model_name, layers, points, device, turns, lambda: results.put((result, False)), skip_guards)
    except Exception:
        result.errors["all"] = traceback.format_exc(limit=-4)
        turns.died.set()
        turns.meeting.abort()
    results.put((result, True))


def _measure(
    result: PeerResult,
    model_name: str,
    layers: int | None,
    points: list[Point],
    device: str,
    turns: Turns,
    report: Callable[[], None],
    skip_guards: bool,
) -> None:
    import torch

    from .models import build, quantized_fraction
    from .peers import PEERS

    peer = dataclasses.replace(PEERS[result.peer], skip_guards=skip_guards)
    with turns.alone(), torch.no_grad():

        def quantize(module: Any) -> None:
            _synchronize(device)
            start = time.perf_counter()
            peer.quantize(module)
            _synchronize(device)
            result.quantize_s += time.perf_counter() - start

        start = time.perf_counter()
        model = build(model_name, layers, peer.attention, device, quantize if peer.by_layer else None)
        _synchronize(device)
        result.build_s = time.perf_counter() - start - result.quantize_s
        if peer.quantize is not None:
            quantize(model)
        _release(device)
        if device == "cuda":
            result.weights_bytes = torch.cuda.memory_allocated()
        result.quantized_fraction = quantized_fraction(model)
    for point in points:
        step = None
        if time.time() < turns.deadline:
            step = _attempt(result, point, functools.partial(_compile, result, peer, model, point, device))
        if not turns.meet():
            result.errors.setdefault(point.name, LATE)
        elif step is not None:
            with turns.alone():
                _attempt(result, point, functools.partial(_time, result, point, step, device))
            if turns.died.is_set():
                result.errors.setdefault(point.name, ALONE)
        report()
        turns.meet()
        step = None
        torch._dynamo.reset()
        _release(device)


def _attempt(result: PeerResult, point: Point, action: Callable) -> Any:
    try:
        return action()
    except Exception:
        result.errors[point.name] = traceback.format_exc(limit=-3)
        return None


def _compile(result: PeerResult, peer: Any, model: Any, point: Point, device: str) -> Callable[[], Any]:
    """A function that runs the point once; compiled and warm. Its compile time is that of the first call."""
    import torch

    from .peers import compiled

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    forward = compiled(peer, model)
    if point.kind == "decode":
        step = _decode_step(model, forward, point.size, point.context, device)
    else:
        step = _prefill_step(model, forward, point.size, device)
    start = time.perf_counter()
    out = step()
    _synchronize(device)
    result.compile_s[point.name] = time.perf_counter() - start
    for _ in range(3):
        out = step()
    if not torch.isfinite(out.float()).all():
        raise ArithmeticError("logits are not finite")
    return step


def _decode_step(model: Any, forward: Callable, batch: int, context: int, device: str) -> Callable[[], Any]:
    """One token behind ``context``: the first :data:`PROMPT` of them went through the model, the others are random."""
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_batch_size=batch, max_cache_len=context + ROOM)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (1, PROMPT), device=device).expand(batch, -1)
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.layers:
            for part in (layer.keys, layer.values):
                part[:, :, PROMPT:context].normal_()
    token = torch.randint(0, vocabulary, (batch, 1), device=device)
    position = torch.full((1, 1), context, device=device)

    def step() -> Any:
        with torch.no_grad():
            return forward(token, past_key_values=cache, use_cache=True, position_ids=position).logits

    def rewind() -> None:
        """The cache holds the prompt only, so that any number of steps fits in."""
        for layer in cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                layer.cumulative_length.fill_(context)

    rewind()
    step.rewind = rewind  # type: ignore[attr-defined]
    return step


def _prefill_step(model: Any, forward: Callable, tokens: int, device: str) -> Callable[[], Any]:
    import torch

    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)

    def step() -> Any:
        with torch.no_grad():
            return forward(prompt, use_cache=False, logits_to_keep=1).logits

    step.rewind = lambda: None  # type: ignore[attr-defined]
    return step


def _time(result: PeerResult, point: Point, step: Any, device: str) -> None:
    import torch

    steps = STEPS[point.kind]
    times = []
    for _ in range(ROUNDS):
        step.rewind()
        step()
        _synchronize(device)
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(steps):
                step()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / steps)
        else:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            times.append((time.perf_counter() - start) * 1e6 / steps)
    result.times_us[point.name] = statistics.median(times)
    seconds = result.compile_s[point.name]
    print(f"{point.name}, {result.peer}: {result.times_us[point.name]:.0f} us, compiled in {seconds:.1f} s", flush=True)
    if device == "cuda":
        result.peak_bytes[point.name] = torch.cuda.max_memory_allocated()
        step.rewind()
        result.kernels[point.name] = _kernels(step)


def _kernels(step: Callable) -> list:
    """``(name, count, microseconds each)`` of one call, longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = totals.setdefault(event.name[:80], [0, 0.0])
            entry[0] += 1
            entry[1] += event.time_range.elapsed_us()
    ordered = sorted(totals.items(), key=lambda item: -item[1][1])
    return [(name, int(count), round(total / count, 2)) for name, (count, total) in ordered[:16]]


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _release(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
