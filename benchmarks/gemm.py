"""W4A8 with integer scales against other matrix products on a GPU, side by side in one run.

    python benchmarks/gemm.py                                              # all shapes, all peers that are installed
    python benchmarks/gemm.py --shapes llama-8b --tokens 1 64 4096 --peers intscale fp8 bf16
    python benchmarks/gemm.py --json OUT.json --picture OUT.svg --seconds 540
    python benchmarks/gemm.py --report OUT.json                            # print the tables of an earlier run; no GPU

GEMM only: activations are quantized before, in the form each peer takes. Random data; medians of CUDA graph replays in which
the peers take turns, over copies of each weight that together exceed twice the L2 cache. Every time is of a kernel whose
output was checked at that very size. QServe and QQQ have no wheels, need a build from source, and are not included.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
from pathlib import Path

import gemm_report
import roofline_svg
import torch
from gemm_peers import PEERS, Activations, Peer, Unavailable, WrongResult, compile_ahead
from gemm_results import Point, Results, Shape
from timing import Budget, alternate_ms, capture, copy_bandwidth, copy_count, environment, l2_bytes, release

MODELS: dict[str, tuple[Shape, ...]] = {  # N x K: qkv, o, gate_up, down
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "mixtral-8x7b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),  # one expert; the sizes of llama-8b
}
TOKENS = tuple(2**power for power in range(14))
SHAPE_SECONDS = 15.0  # left at least, or a shape is not begun
POINT_SECONDS = 5.0  # likewise for one M
REPLAY_MS = 50.0  # of each peer at each point


class DeviceLost(Exception):
    """The CUDA context is unusable; nothing more can be measured in this process."""


def parse_shapes(words: list[str]) -> list[Shape]:
    """Model names and ``NxK`` to shapes, each once."""
    shapes: list[Shape] = []
    for word in words:
        if word in MODELS:
            shapes += MODELS[word]
        elif match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word):
            shapes.append((int(match[1]), int(match[2])))
        else:
            raise ValueError(f"shape {word!r} is neither NxK nor one of {', '.join(MODELS)}")
    return list(dict.fromkeys(shapes))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; unknown names end with a message."""
    parser = argparse.ArgumentParser(prog="gemm", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(MODELS), metavar="SHAPE", help=f"NxK, {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="M")
    parser.add_argument(
        "--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="PEER", help=", ".join(PEERS)
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="for the whole run; what does not fit is left out")
    parser.add_argument("--json", type=Path, help="every raw number; written after each shape")
    parser.add_argument("--picture", type=Path, help="SVG: time against M with the memory and int8 floors")
    parser.add_argument("--report", type=Path, help="print the tables of this JSON file and do not measure")
    parser.add_argument("--exact", action="store_true", help="also compare our int32 accumulators bit for bit (slow)")
    parser.add_argument("--humming-threads", type=int, help="compilers that humming runs at once (default: all cores)")
    parser.add_argument("--gemlite-tune", action="store_true", help="let gemlite autotune (half a minute a point)")
    args = parser.parse_args(argv)
    try:
        args.shapes = parse_shapes(args.shapes)
    except ValueError as error:
        parser.error(str(error))
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    args.tokens = sorted(set(args.tokens))
    args.peers = list(dict.fromkeys(args.peers))
    return args


def describe(error: BaseException) -> str:
    """An error as one short line."""
    words = " ".join(str(error).split())
    text = words if isinstance(error, Unavailable | WrongResult) else f"{type(error).__name__}: {words}"
    return text if len(text) <= 200 else text[:197] + "..."


def log(message: str) -> None:
    """Progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


class Run:
    """Measures one shape after the other; whatever a peer does wrong becomes its reason and nothing else."""

    def __init__(self, args: argparse.Namespace, results: Results, budget: Budget, device: str = "cuda"):
        self.args, self.results, self.budget, self.device = args, results, budget, device
        self.peers: dict[str, type[Peer]] = {}

    def select_peers(self) -> None:
        """Keep the peers that import; the others become notes."""
        for name in self.args.peers:
            try:
                PEERS[name].require()
            except Exception as error:  # foreign code: whatever it raises is why it is not measured
                self.results.notes.append(f"{name}: {describe(error)}")
            else:
                self.peers[name] = PEERS[name]
                self.results.titles[name] = PEERS[name].title

    def failed(self, shape: Shape, tokens: list[int], name: str, error: BaseException) -> None:
        """Record why a peer has no time; raise ``DeviceLost`` if the device did not survive it."""
        where = f"{name} at {shape[0]} x {shape[1]}, M = {', '.join(map(str, tokens))}"
        for m in tokens:
            point = Point(*shape, m, name, problem=describe(error), wrong=isinstance(error, WrongResult))
            self.results.add(point)
        if isinstance(error, Unavailable):
            return
        log(f"gemm: {where}: {describe(error)}")
        try:
            torch.cuda.synchronize()
        except Exception as lost:
            raise DeviceLost(f"{where}: {describe(lost)}") from error

    def prepare(self, shape: Shape) -> dict[str, Peer]:
        """Quantize one random weight for every peer, and copy it as often as the L2 cache asks for."""
        weight = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
        live: dict[str, Peer] = {}
        for name, kind in self.peers.items():
            try:
                peer = kind(weight, self.args)
                peer.replicate(copy_count(peer.weight_bytes, l2_bytes()))
                torch.cuda.synchronize()
            except Exception as error:
                self.failed(shape, self.args.tokens, name, error)
            else:
                live[name] = peer
            torch.cuda.empty_cache()
        return live

    def checked_graph(self, peer: Peer, x: Activations, shape: Shape, m: int):
        """The point with its error filled in, and the graph to time."""
        if reason := peer.refuse(m):
            raise Unavailable(reason)
        error, out = peer.check(x)
        point = Point(*shape, m, peer.name, copies=len(peer.copies), error=error, moved_bytes=peer.moved_bytes(x, out))
        del out
        return point, capture([functools.partial(peer.run, x, tensors) for tensors in peer.copies])

    def measure(self, shape: Shape, m: int, live: dict[str, Peer]) -> None:
        """All peers at one M."""
        x = Activations(m, shape[1], self.device)
        points, graphs = {}, {}
        for name, peer in live.items():
            try:
                points[name], graphs[name] = self.checked_graph(peer, x, shape, m)
            except Exception as error:
                self.failed(shape, [m], name, error)
        try:
            times = alternate_ms(graphs, REPLAY_MS)
        except Exception as lost:  # a replay only fails with the device
            raise DeviceLost(f"replays at {shape[0]} x {shape[1]}, M = {m}: {describe(lost)}") from lost
        for name, samples in times.items():
            points[name].samples_us = [round(ms * 1e3 / points[name].copies, 4) for ms in samples]
            self.results.add(points[name])

    def measure_shape(self, shape: Shape) -> None:
        """Every M that the budget allows."""
        live = self.prepare(shape)
        for m in self.args.tokens:
            if self.budget.spent(POINT_SECONDS):
                left_out = [t for t in self.args.tokens if t >= m]
                self.results.notes.append(f"{shape[0]} x {shape[1]}, M = {left_out}: no time left")
                break
            started = time.monotonic()
            self.measure(shape, m, live)
            log(
                f"gemm: {shape[0]} x {shape[1]}, M = {m}: {time.monotonic() - started:.1f} s, {self.budget.left():.0f} s left"
            )

    def measure_all(self) -> None:
        """Every shape that the budget allows, printed and saved as soon as it is done."""
        for shape in self.args.shapes:
            if self.budget.spent(SHAPE_SECONDS):
                self.results.notes.append(f"{shape[0]} x {shape[1]}: no time left")
                continue
            try:
                self.measure_shape(shape)
            except DeviceLost as lost:
                self.results.notes.append(f"the run ended early, leave this peer out: {lost}")
                break
            finally:
                print(gemm_report.shape_report(self.results, shape), flush=True)
                self.save()
            release()

    def save(self) -> None:
        """Write what was asked for."""
        if self.args.json:
            self.results.save(self.args.json)
        if self.args.picture:
            self.args.picture.write_text(roofline_svg.draw(self.results), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Measure and print; with ``--report`` only print."""
    args = parse_arguments(argv)
    if args.report:
        print(gemm_report.full_report(results := Results.load(args.report)))
        if args.picture:
            args.picture.write_text(roofline_svg.draw(results), encoding="utf-8")
        return
    if not torch.cuda.is_available():
        raise SystemExit("gemm: no CUDA device; --report FILE prints an earlier run")
    budget = Budget(args.seconds)
    torch.manual_seed(0)
    results = Results(environment(), {key: str(value) for key, value in vars(args).items()})
    run = Run(args, results, budget)
    run.select_peers()
    results.bandwidth = copy_bandwidth()
    release()
    print(gemm_report.heading(results), flush=True)
    started = time.monotonic()
    for failure in compile_ahead(list(run.peers.values()), args.shapes, args.tokens, args.humming_threads):
        log(f"gemm: compiling ahead: {failure}")
    log(f"gemm: humming's kernels compiled in {time.monotonic() - started:.0f} s")
    with torch.no_grad():
        run.measure_all()
    print(gemm_report.closing(results))
    run.save()


if __name__ == "__main__":
    main()
