"""How the all-reduce in one kernel is divided best on these GPUs: chunk, chunks between two flags, programs a multiprocessor.

    python benchmarks/allreduce_sweep.py --ranks 4 --json OUT.json

One process of several ranks for each chunk size, as it is part of the compiled kernel. Each result is compared with that of the
schedule that is built in, bit for bit, before it is timed in a CUDA graph. Times are medians of the slowest rank, microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from allreduce import size
from allreduce_parts.measure import random_input
from ranks import is_rank, join, largest, launch
from reporting import size_name
from reporting import table as markdown

from intscale_compile.communication import fused_kernel, symmetric
from intscale_compile.communication.message import Elements, WireFormat

PER_ROUND, PER_MULTIPROCESSOR = (1, 2, 4, 8), (2, 3, 4)
REPLAYS = 15
SPIN_CYCLES = 1_000_000


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="allreduce_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", type=size, nargs="+", default=[8 << 20, 32 << 20, 128 << 20], metavar="BYTES")
    parser.add_argument(
        "--wires", nargs="+", default=["int6", "int4", "elements"], metavar="FORMAT", help="or elements; not int8"
    )
    parser.add_argument("--chunk", type=int, default=fused_kernel.LARGE_CHUNK, help="elements of a large chunk")
    parser.add_argument("--per-round", type=int, nargs="+", default=PER_ROUND)
    parser.add_argument("--programs", type=int, nargs="+", default=PER_MULTIPROCESSOR, help="a multiprocessor")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which the ranks are killed")
    parser.add_argument("--json", type=Path, help="write all times to this file")
    args = parser.parse_args(argv)
    if "int8" in args.wires:
        parser.error("--wires int8: it has another kernel (code_words), which is not divided so")
    return args


def set_schedule(chunk: int, per_round: int, programs: int) -> None:
    """Divide messages so from now on."""
    fused_kernel.LARGE_CHUNK, fused_kernel.MOST_PER_ROUND = chunk, per_round
    fused_kernel.MOST_PER_ROUND_OF_FOUR = {}
    fused_kernel.PROGRAMS_PER_MULTIPROCESSOR = programs
    symmetric._plan.cache_clear()


def time_us(x: torch.Tensor, form: WireFormat | Elements, device: torch.device) -> float:
    """Median of replays of a graph of four calls, of the slowest rank."""
    group, flag = dist.group.WORLD, torch.zeros(1, device=device)
    symmetric.all_reduce(x, form, group)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(4):
            symmetric.all_reduce(x, form, group)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)
        dist.all_reduce(flag)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 4)
    return largest(statistics.median(times), device)


def rank_main(args: argparse.Namespace) -> int:
    """What one rank does."""
    device = join("nccl", "nvlink")
    first, rows, wrong = dist.get_rank() == 0, [], 0
    try:
        for nbytes in args.sizes:
            x = random_input(nbytes // 2, device, dist.get_rank(), 0)
            for wire in args.wires:
                form = Elements() if wire == "elements" else WireFormat.parse(wire)
                set_schedule(args.chunk, 4, 4)
                wanted = symmetric.all_reduce(x, form, dist.group.WORLD)
                assert wanted is not None, "symmetric memory is not used between these ranks"
                for per_round in args.per_round:
                    for programs in args.programs:
                        set_schedule(args.chunk, per_round, programs)
                        found = symmetric.all_reduce(x, form, dist.group.WORLD)
                        same = largest(float(not torch.equal(found, wanted)), device) == 0
                        wrong += not same
                        us = time_us(x, form, device)
                        rows.append(
                            dict(
                                bytes=nbytes, wire=wire, chunk=args.chunk, per_round=per_round, programs=programs, us=us
                            )
                        )
        if first:
            show(rows, args)
            print(f"allreduce_sweep: {wrong} of {len(rows)} results are wrong")
        return int(wrong > 0)
    finally:
        dist.destroy_process_group()


def show(rows: list[dict], args: argparse.Namespace) -> None:
    """Print the table and write the file."""
    sizes = sorted({row["bytes"] for row in rows})
    header = ["chunk, chunks a round, programs", *(f"{size_name(n)} {wire}" for n in sizes for wire in args.wires)]
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        lines.setdefault((row["chunk"], row["per_round"], row["programs"]), []).append(f"{row['us']:.1f}")
    print(markdown(header, [[", ".join(map(str, key)), *cells] for key, cells in lines.items()]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Start the ranks, or be one."""
    args = parse(argv)
    return rank_main(args) if is_rank() else launch(args.ranks, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
