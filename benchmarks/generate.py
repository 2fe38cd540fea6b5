"""``generate`` of transformers as a user calls it: first token, time of each further token, memory, first call.

    python benchmarks/generate.py                                            # Llama-3-8B, all peers
    python benchmarks/generate.py --peers bf16 bf16_prompt ours --points 1x1024 1x8192 16x1024
    python benchmarks/generate.py --model tiny --device cpu --points 1x64 --peers bf16 ours

Peers are set up as their users do: a static cache and ``CompileConfig(mode="reduce-overhead")``; ``_prompt`` peers have their
prompts compiled as well, by the same code as ours; ``ours_layers`` compiles one layer for prompts, not the model; ``ours_w8a8``
has its output embedding in 8 bits, which the others leave in bf16. Random weights. A point is BATCHxPROMPT. Each peer has a
process of its own, one after the other; times are medians over calls and steps, read at the arrival of each token on the host.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from e2e_parts.models import CONFIGS, build
from e2e_parts.peers import PEERS as WAYS
from timing import environment

PEERS = {  # what is quantized, how prompts run
    "bf16": ("bf16", "eager"), "bf16_prompt": ("bf16", "compiled"), "fp8": ("fp8", "eager"), "int8": ("int8", "eager"),
    "ours": ("intscale", "auto"), "ours_w8a8": ("intscale_w8a8", "auto"),
    "ours_layers": ("intscale", "layers"), "ours_eager_prompt": ("intscale", "eager"),
}  # fmt: skip
CALLS = 4


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="generate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama-3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=list(PEERS), metavar="PEER")
    parser.add_argument("--points", nargs="+", default=["1x128", "1x1024", "1x2048", "1x8192", "16x1024"])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds after which no further point is begun")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(argv)


class Arrivals:
    """A stopping criterion that never stops: it notes when each token is there."""

    def __init__(self, device: str):
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Wait for the token."""
        input_ids[:, -1].tolist()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def prepared_model(peer: str, model_name: str, layers: int | None, device: str) -> Any:
    """The model as the peer's user sets it up."""
    from transformers import CompileConfig, GenerationConfig

    import intscale_compile

    way, prompt = PEERS[peer]
    ours = way.startswith("intscale")

    def quantize(module: Any) -> None:
        from torchao.quantization import quantize_

        if ours:
            output = "w8a8" if way == "intscale_w8a8" else None
            quantize_(module, intscale_compile.IntScaleConfig(output_embedding=output))
        elif WAYS[way].quantize is not None:
            quantize_with_head_left(module, way)

    model = build(model_name, layers, "sdpa", device)
    quantize(model)
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    backend = "intscale" if ours else "inductor"
    if ours or prompt == "compiled":
        print(intscale_compile.prepare_for_generation(model, backend=backend, prompt=prompt), file=sys.stderr)
    else:
        config = CompileConfig(
            backend=backend, mode="reduce-overhead" if device == "cuda" else "default", dynamic=False
        )
        config._compile_all_devices = True
        model.generation_config.compile_config, model.generation_config.cache_implementation = config, "static"
    return model


def quantize_with_head_left(model: Any, way: str) -> None:
    """As ``IntScaleConfig()`` does, the peers of torchao leave the output embedding in bf16."""
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    WAYS[way].quantize(model)
    model.lm_head = head


def measure(peer: str, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """All points of one peer."""
    start = time.perf_counter()
    model = prepared_model(peer, args.model, args.layers, args.device)
    found: dict[str, Any] = dict(peer=peer, build_s=time.perf_counter() - start, points={})
    for point in args.points:
        if time.time() > deadline:
            break
        try:
            found["points"][point] = measure_point(model, *map(int, point.split("x")), args)
        except Exception as error:  # a peer that cannot do a point does the others
            found["points"][point] = dict(error=f"{type(error).__name__}: {error}"[:300])
        print(json.dumps({peer: {point: found["points"][point]}}), file=sys.stderr, flush=True)
    return found


def measure_point(model: Any, batch: int, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Times of one batch size and length of prompt."""
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    calls = []
    for call in range(CALLS):
        ids = torch.randint(1, model.config.vocab_size, (batch, tokens), device=args.device)
        arrivals = Arrivals(args.device)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens,
            stopping_criteria=[arrivals],
        )  # fmt: skip
        end = time.perf_counter()
        steps = [b - a for a, b in zip(arrivals.times, arrivals.times[1:])]
        calls.append(dict(first=arrivals.times[0] - start, steps=steps, total=end - start))
        if call and end - start > 20:
            break
    later = calls[1:] or calls
    return dict(
        first_call_s=calls[0]["total"],
        first_token_ms=1e3 * statistics.median(c["first"] for c in later),
        token_ms=1e3 * statistics.median(s for c in later for s in c["steps"]),
        mean_token_ms=1e3 * min(statistics.fmean(c["steps"]) for c in later),
        second_token_ms=1e3 * statistics.median(c["steps"][0] for c in later),
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
    )


def table(results: list[dict[str, Any]], points: list[str]) -> str:
    """A row for each peer and point, ratios to the first peer."""
    columns = ["first_token_ms", "token_ms", "mean_token_ms", "peak_gb", "first_call_s"]
    lines = [f"| point | peer | {' | '.join(columns)} | first token | token |", "|---" * (len(columns) + 4) + "|"]
    base = results[0]["points"]
    for point in points:
        for result in results:
            row = result["points"].get(point)
            if row is None or "error" in row:
                lines.append(f"| {point} | {result['peer']} | {'not measured' if row is None else row['error']} |")
                continue
            cells = [f"{row[c]:.2f}" for c in columns]
            if "first_token_ms" in base.get(point, {}):
                cells += [f"{row[c] / base[point][c]:.2f}" for c in ("first_token_ms", "mean_token_ms")]
            lines.append(f"| {point} | {result['peer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a point failed."""
    args = parse(argv)
    facts, deadline = environment(), time.time() + args.budget
    context = multiprocessing.get_context("spawn")
    results = []
    for peer in args.peers:
        with context.Pool(1, maxtasksperchild=1) as pool:
            results.append(pool.apply(measure, (peer, args, deadline)))
        if args.json:
            args.json.write_text(json.dumps(dict(environment=facts, model=args.model, results=results), indent=1))
    print(f"{args.model}, {facts['device']}, torch {torch.__version__}\n\n{table(results, args.points)}")
    return int(any("error" in row for result in results for row in result["points"].values()))


if __name__ == "__main__":
    sys.exit(main())
