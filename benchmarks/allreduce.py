"""All-reduce of bf16 over several ranks: the backend's own, those on symmetric memory, and ours in low-bit messages.

    python benchmarks/allreduce.py                                     # 2 GPUs over NVLink, 8 KB to 256 MB
    python benchmarks/allreduce.py --ranks 4 --link host --json OUT.json --svg OUT.svg
    python benchmarks/allreduce.py --backend gloo --sizes 8M 16M       # on CPUs
    python benchmarks/allreduce.py --stress 10000 --sizes              # random collectives, each compared with the reference
    python benchmarks/allreduce.py --project nvlink.json               # 4 and 8 GPUs, PCIe: computed, not measured; no GPU
    sudo python benchmarks/slow_link.py -- benchmarks/allreduce.py --backend gloo --sizes 8M 16M 32M

Starts its ranks itself unless it is one (torchrun). Random normal data; peers take turns; each time is the median of the
slowest rank. "fused" is one kernel on symmetric memory, without it the messages go through the process group.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from allreduce_parts import compile_ahead, measure, peers, projection, report, stress
from allreduce_parts.results import Results
from ranks import LINKS, agreed, check_ranks_and_wires, is_rank, join, launch, link_name
from timing import environment, release

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SIZES = tuple(1 << power for power in range(13, 29))
WIRES = ("int8", "int6", "int5", "int4")


def size(text: str) -> int:
    """Bytes of ``64K``, ``1M`` or a number."""
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper().replace(" ", ""))
    if match is None or int(match[1]) * UNITS[match[2]] < 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of at least 4K, such as 64K or 32M")
    return int(match[1]) * UNITS[match[2]] // 256 * 256


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="allreduce", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--link", choices=sorted(LINKS), default="nvlink", help="that NCCL is held to")
    parser.add_argument(
        "--sizes", type=size, nargs="*", default=list(SIZES), metavar="BYTES", help="such as 64K 32M; or none"
    )
    parser.add_argument("--wires", nargs="+", default=list(WIRES), metavar="FORMAT", help="as int8 or int6-spikes")
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        help="plain, two_shot, 'one_shot fp32', auto, FORMAT, 'FORMAT fused' ...; default all",
    )
    parser.add_argument("--replay-ms", type=float, help="how long each peer is timed at each size")
    parser.add_argument("--stress", type=int, metavar="N", default=0, help="first run N random collectives")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=stress.DTYPES, help="of --stress")
    parser.add_argument("--most", type=size, help="bytes of the largest message of --stress")
    parser.add_argument("--stress-seconds", type=float, help="after which --stress ends")
    parser.add_argument("--seed", type=int, default=0, help="of --stress")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which the ranks are killed")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--svg", type=Path, help="write the picture to this file")
    parser.add_argument("--project", type=Path, metavar="JSON", help="project an earlier run and do not measure")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print an earlier run and do not measure")
    args = parser.parse_args(argv)
    check_ranks_and_wires(parser, args)
    args.sizes = sorted(set(args.sizes))
    return args


def make_peers(args: argparse.Namespace, device: torch.device, results: Results) -> list[peers.Peer]:
    """The peers that this machine offers; the others become notes."""
    most = max(peers.copies(n, device) * n for n in args.sizes)
    made = []
    for name in args.peers or peers.names(args.wires, device):
        peer, problem = None, ""
        try:
            peer = peers.make(name, device, args.link, most)
        except Exception as error:  # PyTorch's and the driver's
            problem = str(error) or type(error).__name__
        if agreed(peer is not None, device):
            made.append(peer)
        else:
            results.notes.append(f"{name}: {problem or 'not on every rank'}")
    return made


def run(args: argparse.Namespace, device: torch.device) -> Results:
    """Measure every size; on rank 0 print and save as it goes."""
    first = dist.get_rank() == 0
    results = Results(environment(), args.backend, link_name(args.backend, args.link), dist.get_world_size())
    made = make_peers(args, device, results)

    def note(text: str) -> None:
        if text not in results.notes:
            results.notes.append(text)

    for nbytes in args.sizes:
        start = time.monotonic()
        replay_ms = args.replay_ms or measure.REPLAY_MS[device.type]
        results.points += measure.measure(made, nbytes, device, note, replay_ms)
        made = [peer for peer in made if results.point(nbytes, peer.name)]  # who is unavailable stays so
        if device.type == "cuda":
            release()
        if first:
            print(f"allreduce: {nbytes} bytes: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
            if args.json:
                results.save(args.json)
    return results


def show(args: argparse.Namespace, results: Results) -> int:
    """Print and write what was asked for; 1 if a result was wrong."""
    print(report.table(results))
    if args.json:
        results.save(args.json)
    if args.svg:
        args.svg.write_text(report.svg(results), encoding="utf-8")
    for fault in results.faults:
        print(f"allreduce: {fault}", file=sys.stderr)
    return int(bool(results.faults))


def rank_main(args: argparse.Namespace) -> int:
    """What one rank does."""
    device = join(args.backend, args.link)
    first, status = dist.get_rank() == 0, 0
    try:
        if args.stress:
            outcome = stress.run(
                args.stress, args.wires, args.dtypes, args.most, args.seed, args.link, device, args.stress_seconds
            )
            status = int(outcome.wrong > 0)
            if first:
                print(outcome, flush=True)
        if args.sizes:
            results = run(args, device)
            status |= show(args, results) if first else int(bool(results.faults))
        return status
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Start the ranks, or be one, or print an earlier run."""
    args = parse(argv)
    if args.report:
        args.json = None
        return show(args, Results.load(args.report))
    if args.project:
        print(projection.table(Results.load(args.project)))
        return 0
    if args.backend == "nccl" and torch.cuda.device_count() < args.ranks:
        raise SystemExit(f"allreduce: {args.ranks} ranks need as many GPUs; --backend gloo runs on CPUs")
    if is_rank():
        return rank_main(args)
    if args.backend == "nccl":
        start = time.monotonic()
        for failure in compile_ahead.compile_ahead(args):
            print(f"allreduce: compiling ahead: {failure}", file=sys.stderr)
        print(f"allreduce: kernels compiled in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return launch(args.ranks, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
