"""Whole models, end to end: prefill and decode of bf16, torchao's fp8, int8 and int4, and ours, in one run on one GPU.

    python benchmarks/e2e.py                                   # Llama-3-8B, all peers
    python benchmarks/e2e.py --model mixtral-8x7b --peers bf16 intscale --batches 1 16 --prompts 2048
    python benchmarks/e2e.py --model llama-3-70b --layers 1
    python benchmarks/e2e.py --contexts 128 2048 8192 32768 --batches 1 16 --prompts    # decoding behind long texts
    python benchmarks/e2e.py --model tiny --device cpu         # does everything run

Random weights at real shapes, transformers' own model code, ``torch.compile`` with CUDA graphs. Each peer has a process of
its own; they compile side by side and are timed one after the other. Decoding starts behind 128 tokens (or ``--contexts``) in
a static cache of 128 more; prefill is one prompt without a cache, logits of its last token. Ratios are speeds over bf16 in
the same run. A step of a few layers may be sooner computed than submitted; ``--skip-guards`` spares the host its guards, for
all peers alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from e2e_parts.measure import PROMPT, PeerResult, Point, Turns, run_peer
from e2e_parts.models import CONFIGS
from e2e_parts.peers import PEERS
from e2e_parts.report import as_json, svg, table, traces
from timing import environment

DEFAULT_PEERS = ("bf16", "fp8", "int4", "int8", "float_scales", "intscale", "intscale_head")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="e2e", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="number of layers; the model's own by default")
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=list(DEFAULT_PEERS), metavar="PEER")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 4], help="batch sizes of decoding")
    parser.add_argument("--contexts", type=int, nargs="+", default=[PROMPT], help="tokens in the cache before a step")
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048, 512, 8192], help="tokens of prefill")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--skip-guards", action="store_true", help="all peers without Dynamo's guards on modules")
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds after which no further point is begun")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--svg", type=Path, help="write the picture to this file")
    parser.add_argument("--traces", action="store_true", help="print where the time goes")
    return parser.parse_args(argv)


def interleaved(batches: list[int], prompts: list[int], contexts: list[int]) -> list[Point]:
    """Points in the order in which they are measured: the most telling of both kinds first."""
    decode = [Point("decode", b, c) for c in contexts for b in batches]
    prefill = [Point("prefill", t) for t in prompts]
    mixed = [p for pair in zip(decode, prefill) for p in pair]
    return mixed + decode[len(prefill) :] + prefill[len(decode) :]


def measure(args: argparse.Namespace, points: list[Point], save: Callable[[dict[str, PeerResult]], None]) -> tuple:
    """Run all peers: results in the order of the command line (given to ``save`` as they come) and names of dead processes."""
    context = multiprocessing.get_context("spawn")
    turns = Turns(context.Barrier(len(args.peers)), context.Lock(), context.Event(), time.time() + args.budget)
    results = context.Queue()
    processes = {
        name: context.Process(
            target=run_peer, args=(name, args.model, args.layers, points, args.device, turns, results, args.skip_guards)
        )
        for name in args.peers
    }
    for process in processes.values():
        process.start()
    found: dict[str, PeerResult] = {}
    at_work = set(processes)
    while at_work:
        try:
            result, last = results.get(timeout=5)
        except queue.Empty:
            if dead := {name for name in at_work if not processes[name].is_alive()}:
                turns.died.set()
                turns.meeting.abort()
                at_work -= dead
            continue
        found[result.peer] = result
        at_work -= {result.peer} if last else set()
        save({name: found[name] for name in args.peers if name in found})
    for process in processes.values():
        process.join(timeout=20)
        if process.is_alive():
            process.kill()
    lost = [name for name, process in processes.items() if process.exitcode]
    return {name: found[name] for name in args.peers if name in found}, lost


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a peer failed at a point."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("e2e: no CUDA device; --model tiny --device cpu shows that everything runs")
    points = interleaved(args.batches, args.prompts, args.contexts)
    ordered = sorted(points, key=lambda p: (p.kind, p.context, p.size))
    facts = environment()

    def save(results: dict[str, PeerResult]) -> None:
        if args.json:
            args.json.write_text(json.dumps(as_json(results, ordered, facts, args.model), indent=1))

    results, lost = measure(args, points, save)
    title = f"{args.model}{f', {args.layers} layers' if args.layers else ''}: speed over bf16, {facts['device']}"
    print(f"{title}; torch {torch.__version__}\n\n{table(results, ordered)}\n")
    for name, result in results.items():
        print(f"{name}: {result.quantized_fraction:.1%} of parameters quantized", file=sys.stderr)
        for where, text in result.errors.items():
            print(f"{name}, {where}: {text}", file=sys.stderr)
    if args.traces:
        print(traces(results, ordered))
    if args.svg:
        args.svg.write_text(svg(results, ordered, title))
    for name in lost:
        print(f"{name}: its process died", file=sys.stderr)
    return int(bool(lost) or any(result.errors for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
