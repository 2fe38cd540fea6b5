"""Seconds of a cold first call under torch.compile: bf16 against ours, kernels compiled ahead or at their first launch.

    python benchmarks/compile_time.py                              # Llama-3-8B, 32 layers, decoding and prefill, on a GPU
    python benchmarks/compile_time.py --layers 8 --points decode --repeat 2
    python benchmarks/compile_time.py --model tiny --device cpu    # does everything run

Every figure is from a process of its own with empty caches, alone on the machine; variants take turns. Beside the seconds
stand those of Dynamo, of our passes, of AOTAutograd with Inductor (waiting: for its Triton kernels when all else was
done), of the run after it and of the kernels compiled ahead, and the Triton kernels that the main thread had to
compile at their first launch: with compilation ahead there should be none of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from e2e_parts.models import CONFIGS
from reporting import table as markdown

VARIABLE = "INTSCALE_COMPILE_AHEAD"
VARIANTS = {"bf16": ("bf16", "1"), "ours": ("intscale", "1"), "ours, at first launch": ("intscale", "0")}
POINTS = {"decode": 1, "prefill": 2048}
PHASES = ("seconds", "dynamo", "passes", "inductor", "waiting", "run")
MARK = "result: "


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="compile_time", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="number of layers; the model's own by default")
    parser.add_argument("--points", nargs="+", choices=sorted(POINTS), default=list(POINTS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the table has medians")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--child", nargs=2, metavar=("POINT", "VARIANT"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def first_call(model_name: str, layers: int | None, point: str, variant: str, device: str) -> dict[str, Any]:
    """Build, quantize and call the compiled model once; in a process with empty caches."""
    import torch
    from e2e_parts import measure, models
    from e2e_parts.peers import PEERS, compiled

    import intscale_compile

    peer = PEERS[VARIANTS[variant][0]]
    with torch.no_grad():
        model = models.build(model_name, layers, peer.attention, device, peer.quantize if peer.by_layer else None)
        if peer.quantize is not None:
            peer.quantize(model)
    make = measure._decode_step if point == "decode" else measure._prefill_step
    step = make(model, compiled(peer, model), POINTS[point], device)
    late = _listen()
    measure._synchronize(device)
    start = time.perf_counter()
    step()
    measure._synchronize(device)
    seconds = time.perf_counter() - start
    phases = {name: sum(times) for name, times in torch._dynamo.utils.compilation_time_metrics.items()}
    ours = intscale_compile.compile_times()
    return dict(
        point=point,
        variant=variant,
        seconds=seconds,
        dynamo=phases.get("bytecode_tracing", 0.0),
        passes=sum(entry.rewriting for entry in ours),
        inductor=phases.get("create_aot_dispatcher_function", 0.0),
        waiting=phases.get("async_compile.wait", 0.0),
        run=seconds - phases.get("_compile.compile_inner", seconds),
        ahead=[dict(kernels=entry.kernels, ready=entry.ready, seconds=entry.ahead) for entry in ours],
        late=late,
        phases={name: round(value, 3) for name, value in sorted(phases.items(), key=lambda x: -x[1])[:40]},
    )


def _listen() -> list[str]:
    """Names of the kernels that Triton compiles in this process's main thread from now on; none without Triton's listener."""
    late: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        return late

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit and threading.current_thread() is threading.main_thread():
            late.append(src.name)

    knobs.compilation.listener = listen
    return late


def run_child(args: argparse.Namespace, point: str, variant: str) -> dict[str, Any]:
    """One cold process; raises RuntimeError with its output if it fails."""
    command = [sys.executable, __file__, "--model", args.model, "--device", args.device, "--child", point, variant]
    command += ["--layers", str(args.layers)] if args.layers else []
    with tempfile.TemporaryDirectory(prefix="compile_time_") as folder:
        caches = dict(TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=folder)
        environment = os.environ | caches | {VARIABLE: VARIANTS[variant][1]}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{point}, {variant}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix(MARK))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each point and variant, medians, with the ratio to bf16."""
    header = [
        "",
        "first call s",
        "to bf16",
        "Dynamo",
        "passes",
        "AOT + Inductor",
        "of it waiting",
        "first run",
        "ahead",
        "compiled at launch",
    ]
    rows = []
    for point, variant in dict.fromkeys((r["point"], r["variant"]) for r in results):
        own = [r for r in results if (r["point"], r["variant"]) == (point, variant)]
        base = [r["seconds"] for r in results if (r["point"], r["variant"]) == (point, "bf16")]
        middle = {n: statistics.median(r[n] for r in own) for n in PHASES}
        ahead = own[0]["ahead"]
        rows.append(
            [
                f"{point} {POINTS[point]}, {variant}",
                f"{middle['seconds']:.1f}",
                f"{middle['seconds'] / statistics.median(base):.2f}" if base else "-",
                *(f"{middle[name]:.1f}" for name in PHASES[1:]),
                ", ".join(f"{a['ready']} of {a['kernels']} in {a['seconds']:.1f} s" for a in ahead) or "-",
                ", ".join(f"{own[0]['late'].count(n)} {n}" for n in dict.fromkeys(own[0]["late"])) or "-",
            ]
        )
    return markdown(header, rows)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = parse(argv)
    if args.child:
        print(MARK + json.dumps(first_call(args.model, args.layers, *args.child, args.device)), flush=True)
        return 0
    results = []
    for point in args.points:
        for _ in range(args.repeat):
            for variant in args.variants:
                results.append(run_child(args, point, variant))
                print(f"{point}, {variant}: {results[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
