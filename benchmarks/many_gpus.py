"""Everything that is to be read on several GPUs of one host, in one command: correctness first, then times.

    python benchmarks/many_gpus.py --folder OUT                 # all GPUs of this machine, about eight minutes
    python benchmarks/many_gpus.py --folder OUT --only times tune decode --ranks 2

Each part is a process of its own with a time limit; what it prints lies in OUT, its JSON file beside it. A part that fails does
not stop the others. At the end one table says what became of each part, and what the parts printed follows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ranks import NO_MULTICAST

HERE = Path(__file__).parent
SIZES = ["8K", "16K", "64K", "256K", "512K", "1M", "2M", "8M", "32M", "128M", "256M"]
FUSED = ["int8 fused", "int6 fused", "int4 fused"]
PEERS = ["plain", "two_shot", "torch_one_shot", "one_shot fp32", "two_shot fp32", "auto", *FUSED]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: short.
        seconds: limit.
        command: after ``python``.
    """

    name: str
    seconds: int
    command: list[str]


def parts(ranks: int, folder: Path) -> list[Part]:
    """All parts, in their order."""
    n = ["--ranks", str(ranks)]
    allreduce, e2e = str(HERE / "allreduce.py"), str(HERE / "e2e_parallel.py")
    sweep, wires = str(HERE / "allreduce_sweep.py"), ["--wires", "int8", "int6", "int4"]

    def json(name: str) -> list[str]:
        return ["--json", str(folder / f"{name}.json")]

    stress = [allreduce, *n, "--sizes", "--stress", "10000", "--most", "4M"]
    stress += ["--wires", "int8", "int6", "int5", "int4-spikes"]
    file = HERE.parent / "tests/gpu/test_communication_gpu.py"
    tests = ["-m", "pytest", "-n", "4", "--dist", "load", "-v", "-m", "gpu", str(file), "-k", f"lossless and {ranks}"]
    decode = [e2e, *n, "--bf16", "--layers", "8", "--context", "2048", "--wires", "auto"]
    first = [e2e, *n, "--bf16", "--layers", "4", "--prompts", "2048", "8192", "--wires", "int8", "int4", "auto+int8"]
    large = [e2e, *n, "--bf16", "--model", "llama-3-70b", "--layers", "4", "--context", "2048"]
    large += ["--wires", "auto", "auto+int8"]
    tune = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "intscale_compile.communication"]
    two = [allreduce, "--ranks", "2", "--sizes", *SIZES[::2], *wires, "--peers", *PEERS]
    return [
        Part("stress", 170, [*stress, "--stress-seconds", "100", "--seconds", "165"]),
        Part("tests", 150, tests),
        Part(
            "times",
            130,
            [allreduce, *n, "--sizes", *SIZES, *wires, "--peers", *PEERS, *json("times"), "--seconds", "125"],
        ),
        Part("tune", 60, [*tune, "--seconds", "30", "--ops", "all_reduce", "--wires", "int8", "int4"]),
        Part("decode", 150, [*decode, "--decode", "1", "16", *json("decode"), "--seconds", "145"]),
        Part("sweep", 80, [sweep, *n, *json("sweep"), "--seconds", "75"]),
        Part("two", 70, [*two, *json("two"), "--seconds", "65"]),
        Part("sweep2048", 60, [sweep, *n, "--chunk", "2048", "--programs", "4", *json("sweep2048"), "--seconds", "55"]),
        Part("first", 110, [*first, *json("first"), "--min-bytes", "-1", "--seconds", "105"]),
        Part("large", 110, [*large, "--decode", "1", "16", *json("large"), "--seconds", "105"]),
        Part("batch64", 90, [*decode, "--decode", "64", *json("batch64"), "--seconds", "85"]),
    ]


def run(part: Part, folder: Path, seconds: float) -> str:
    """Run a part for at most ``seconds``; how it ended."""
    path = f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, **NO_MULTICAST, "INTSCALE_LINKS": str(folder / "links"), "PYTHONPATH": path}
    start = time.monotonic()
    with open(folder / f"{part.name}.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            ended = f"exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = "timed out"
            os.killpg(process.pid, 15)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
    return f"{ended}, {time.monotonic() - start:.0f} s"


def main(argv: list[str] | None = None) -> int:
    """Run the parts that go into the time."""
    parser = argparse.ArgumentParser(prog="many_gpus", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=os.environ.get("OUT"), help="of the results; default: $OUT")
    parser.add_argument("--ranks", type=int, help="default: all GPUs")
    parser.add_argument(
        "--seconds", type=float, default=560.0, help="for all parts; no part begins with less than 30 left"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run")
    args = parser.parse_args(argv)
    if args.folder is None:
        parser.error("--folder is needed, or $OUT")
    if args.ranks is None:
        import torch

        args.ranks = torch.cuda.device_count()
    args.folder = args.folder if isinstance(args.folder, Path) else Path(args.folder)
    args.folder.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + args.seconds, []
    for part in parts(args.ranks, args.folder):
        if args.only and part.name not in args.only:
            continue
        left = end - time.monotonic()
        rows.append((part.name, run(part, args.folder, min(part.seconds, left)) if left > 30 else "left out: no time"))
        print(f"many_gpus: {rows[-1][0]}: {rows[-1][1]}", flush=True)
    print("\n| part | |\n| --- | --- |")
    print("\n".join(f"| {name} | {ended} |" for name, ended in rows))
    for name, _ in rows:
        log = args.folder / f"{name}.txt"
        if log.exists():
            print(f"\n## {name}\n{log.read_text()[-2500:]}")
    return int(any("exit status 0" not in ended for _, ended in rows))


if __name__ == "__main__":
    sys.exit(main())
