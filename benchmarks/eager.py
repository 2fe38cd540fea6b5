"""Eager calls on a GPU: time of the host for one quantized linear, and a whole prompt without ``torch.compile``.

    python benchmarks/eager.py                       # linears, then prompts of Llama-3-8B
    python benchmarks/eager.py --linears             # linears only
    INTSCALE_PREPARED_LAUNCHES=0 python benchmarks/eager.py --linears      # every launch through Triton

The time of the host is that of a loop of calls that does not wait for the GPU, the least of many means; what a call costs in a
loop that waits for each result is beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from e2e_parts.models import build
from timing import environment

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 16, 64, 256, 1024, 4096)
PROMPTS = (128, 512, 1024, 2048, 8192)
CALLS, MEANS = 40, 12  # calls of one mean: fewer than the driver queues before the host has to wait


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="eager", description=__doc__.splitlines()[0])
    parser.add_argument("--linears", action="store_true", help="only the linears")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--prompts", type=int, nargs="*", default=list(PROMPTS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(argv)


def host_us(call: Callable[[], Any]) -> float:
    """Microseconds of the host for one call that nobody waits for."""
    call()
    means = []
    for _ in range(MEANS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return min(means)


def wall_ms(call: Callable[[], Any], rounds: int = 7) -> float:
    """Milliseconds from a call to its result, median."""
    call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def linear_pair(n: int, k: int) -> dict[str, torch.nn.Module]:
    """A linear in bf16, and quantized."""
    from torchao.quantization import quantize_

    import intscale_compile

    layers = {}
    for name in ("bf16", "ours"):
        layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        if name == "ours":
            quantize_(layer, intscale_compile.IntScaleConfig())
        layers[name] = layer
    return layers


def linears() -> list[dict[str, Any]]:
    """A row for each shape and number of tokens."""
    rows = []
    for n, k in SHAPES:
        layers = linear_pair(n, k)
        for tokens in TOKENS:
            x = torch.randn(1, tokens, k, device="cuda", dtype=torch.bfloat16)
            row: dict[str, Any] = dict(shape=f"{n} x {k}", tokens=tokens)
            for name, layer in layers.items():
                row[f"{name} host us"] = host_us(lambda layer=layer, x=x: layer(x))
                row[f"{name} wall us"] = wall_ms(lambda layer=layer, x=x: layer(x), 40) * 1e3
            rows.append(row)
    return rows


def first_call_ms(model: torch.nn.Module, tokens: int) -> float:
    """Milliseconds of the first prompt of a new length."""
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(prompt, use_cache=False, logits_to_keep=1)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def prompts(model_name: str, lengths: list[int]) -> list[dict[str, Any]]:
    """A row for each length: eager, no cache, logits of the last token."""
    from torchao.quantization import quantize_

    import intscale_compile

    rows = {tokens: dict(tokens=tokens) for tokens in lengths}
    for name in ("bf16", "ours"):
        quantize = (lambda m: quantize_(m, intscale_compile.IntScaleConfig())) if name == "ours" else None
        model = build(model_name, None, "grouped_sdpa", "cuda", quantize)
        for tokens in lengths:
            prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
            call = lambda prompt=prompt, model=model: model(prompt, use_cache=False, logits_to_keep=1)  # noqa: E731
            rows[tokens][f"{name} first ms"] = first_call_ms(model, tokens)
            rows[tokens][f"{name} ms"] = wall_ms(call)
            rows[tokens][f"{name} new length ms"] = first_call_ms(model, tokens + 1)
        del model, call
        torch.cuda.empty_cache()
    return list(rows.values())


def table(rows: list[dict[str, Any]], figure: str) -> str:
    """Markdown with the ratio of ours to bf16 in ``figure``."""
    names = list(rows[0])
    lines = [f"| {' | '.join([*names, 'ours / bf16'])} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row[n]:.1f}" if isinstance(row[n], float) else str(row[n]) for n in names]
        ratio = row[f"ours {figure}"] / row[f"bf16 {figure}"]
        lines.append(f"| {' | '.join([*cells, f'{ratio:.2f}'])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse(argv)
    facts = environment()
    print(f"{facts['device']}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    found: dict[str, Any] = dict(environment=facts)
    with torch.no_grad():
        found["linears"] = linears()
        print(f"\n{table(found['linears'], 'host us')}\n", flush=True)
        if not args.linears:
            found["prompts"] = prompts(args.model, args.prompts)
            print(table(found["prompts"], "ms"), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
