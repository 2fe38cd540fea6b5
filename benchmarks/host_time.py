"""Time of the host in one decoding step of a compiled model: Dynamo's guards, wrappers, launches.

    python benchmarks/host_time.py                        # on a CPU, generated code is not run after its first call
    python benchmarks/host_time.py --device cuda          # with CUDA graphs; the model is so small that the GPU waits

A Llama of tiny layers and a static cache. A step of a real model takes at least as long as this, however fast its kernels.
Each figure is the least of many means, in a process of its own. On a GPU the processes compile side by side, which takes most
of the time, and are timed one after the other; figures are printed as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import queue
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from reporting import table as markdown

VARIANTS = ("bf16", "ours", "ours, guards on modules skipped")
MEANS, STEPS = 30, 50


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 32])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds after which the rest is left out")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args(argv)


def build(layers: int, device: str, quantized: bool) -> Any:
    """A random Llama ``[hidden 256, 4 heads of 64, 2 of them keys]`` in bf16."""
    from torchao.quantization import quantize_
    from transformers import LlamaConfig, LlamaForCausalLM

    import intscale_compile

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval().requires_grad_(False)
    if quantized:
        quantize_(model, intscale_compile.IntScaleConfig())
    return model


def leave_out_generated_code() -> None:
    """Let a compiled graph return what its first call returned."""
    from torch._inductor.output_code import CompiledFxGraph

    run, results = CompiledFxGraph.__call__, {}

    def call(self: Any, inputs: Any) -> Any:
        if id(self) not in results:
            results[id(self)] = run(self, inputs)
        return results[id(self)]

    CompiledFxGraph.__call__ = call  # type: ignore[method-assign]


def measure(variant: str, layers: int, device: str, turn: Any, results: Any) -> None:
    """Entry of a process: puts ``(variant, layers, microseconds of one step or what went wrong)`` into ``results``."""
    try:
        # On a CPU compiling would disturb what another process times.
        with turn if device == "cpu" else contextlib.nullcontext():
            mean = compiled_step(variant, layers, device)
            with turn if device == "cuda" else contextlib.nullcontext():
                mean(STEPS)
                results.put((variant, layers, min(mean(STEPS) for _ in range(MEANS))))
    except Exception as error:
        results.put((variant, layers, f"{type(error).__name__}: {error}"))


def compiled_step(variant: str, layers: int, device: str) -> Callable[[int], float]:
    """A function that runs so many steps and returns the mean of their microseconds; compiled and warm."""
    from transformers import StaticCache

    torch.set_num_threads(1)
    model = build(layers, device, variant != "bf16")
    options: dict[str, Any] = {"triton.cudagraphs": True} if device == "cuda" else {}
    if "skipped" in variant:
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    if device == "cpu":
        leave_out_generated_code()
    backend = "inductor" if variant == "bf16" else "intscale"
    compiled = torch.compile(model, backend=backend, dynamic=False, options=options or None)
    cache = StaticCache(config=model.config, max_batch_size=1, max_cache_len=256)
    prompt = torch.ones(1, 16, dtype=torch.int64, device=device)
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    position = torch.full((1, 1), 16, device=device)
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def mean(steps: int) -> float:
        for layer in cache.layers:  # the cache holds the prompt only
            if isinstance(length := getattr(layer, "cumulative_length", None), torch.Tensor):
                length.fill_(16)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            compiled(token, past_key_values=cache, use_cache=True, position_ids=position)
        synchronize(device)
        return (time.perf_counter() - start) / steps * 1e6

    mean(5)
    return mean


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def table(figures: dict[str, list[float]], layers: list[int]) -> str:
    """Microseconds, a row for each variant."""
    header = ["us of the host", *(f"{n} layers" for n in layers)]
    return markdown(header, ([name, *(f"{t:.0f}" for t in us)] for name, us in figures.items()))


def measure_all(layers: list[int], device: str, budget: float) -> dict[str, list[float]]:
    """Microseconds by variant, in the order of ``layers``; NaN for what failed or was not there in time."""
    context, deadline = multiprocessing.get_context("spawn"), time.monotonic() + budget
    turn, results = context.Lock(), context.Queue()
    cases = [(variant, n) for variant in VARIANTS for n in layers]
    processes = [context.Process(target=measure, args=(*case, device, turn, results), daemon=True) for case in cases]
    for process in processes:
        process.start()
    found: dict[tuple[str, int], float] = {}
    with contextlib.suppress(queue.Empty):
        for _ in cases:
            variant, n, value = results.get(timeout=max(0.0, deadline - time.monotonic()))
            print(f"{variant}, {n} layers: {value if isinstance(value, str) else f'{value:.0f} us'}", flush=True)
            found[variant, n] = math.nan if isinstance(value, str) else value
    for process in processes:
        process.kill()
    return {variant: [found.get((variant, n), math.nan) for n in layers] for variant in VARIANTS}


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = parse(argv)
    figures = measure_all(args.layers, args.device, args.budget)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}\n\n{table(figures, args.layers)}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "layers": args.layers, "us": figures}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
