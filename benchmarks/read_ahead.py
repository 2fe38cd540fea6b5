"""Cooperative tiles with stages read ahead or not, and with bodies of 2 to 8 blocks of K, side by side in one run on a GPU.

    python benchmarks/read_ahead.py --seconds 170

``intscale_compile.kernels.gluon_launch.loop_body`` decides between the forms that are compared here. Every output is compared
with the first one of its problem to the bit before it is timed; times are medians of CUDA graphs over copies of the weight that
do not fit in the L2 cache together. fp8 (per row, fast accumulation) is timed beside them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from typing import Optional

import torch
from tile_sweep import fp8_us

import intscale_compile.kernels.gluon_launch as gluon_launch
from intscale_compile.kernels.gluon_launch import LoopBody
from intscale_compile.kernels.gluon_tiles import deepest, for_output, scales_in_block
from intscale_compile.kernels.tile import Tile
from intscale_compile.kernels.tile_timing import GpuBench, Problem, Shape, replay_ms

PLAIN, AHEAD, SHORT = LoopBody(4, False), LoopBody(8, True), LoopBody(4, True)
TWO_SUMS = LoopBody(2, False), LoopBody(2, True)
Form = tuple[Tile, Optional[LoopBody]]
RULE = gluon_launch.loop_body


def cooperative(block_m: int, block_n: int, split_k: int = 1) -> Tile:
    """A tile of two consumers, or of three where it has 192 rows."""
    return Tile(block_m, block_n, 12 if block_n == 192 else 8, kernel="cooperative", split_k=split_k)


def specialized(block_m: int, block_n: int, programs: int = 1, split_k: int = 1) -> Tile:
    """A tile of the kernel for up to a few hundred tokens."""
    return Tile(block_m, block_n, kernel="specialized", split_k=split_k, programs_per_sm=programs)


def forms(m: int, n: int, scale_bits: int, group_size: int) -> list[Form]:
    """What is compared for a problem: tiles with the body of their loop (None: by rule)."""
    if scale_bits > 4:
        two = [(cooperative(128, 128), body) for body in TWO_SUMS]
        return [*two, (cooperative(128, 192), TWO_SUMS[0])]
    found: list[Form] = [(cooperative(128, 128), body) for body in (PLAIN, AHEAD, SHORT)]
    found += [(cooperative(128, 192), body) for body in (PLAIN, AHEAD)]
    if group_size == 128 and n <= 8192:
        found += [(cooperative(128, block_n, 2), body) for block_n in (128, 192) for body in (PLAIN, AHEAD)]
        found += [(specialized(128, 64, 2), None), (specialized(128, 64), None)]
    if m > 128 or n > 8192:
        found += [(cooperative(*block), body) for block in ((256, 128), (128, 256)) for body in (PLAIN, AHEAD)]
    return found


PROBLEMS = [  # tokens, output and input features, group size, bits of the group scales
    (256, 6144, 4096, 128, 4), (129, 6144, 4096, 128, 4), (256, 5120, 5120, 128, 4), (300, 5120, 5120, 128, 4),
    (512, 5120, 5120, 128, 4), (256, 4096, 12288, 128, 4), (512, 4096, 12288, 128, 4), (256, 4096, 14336, 128, 4),
    (512, 4096, 14336, 128, 4), (65, 30720, 3840, 128, 4), (65, 24576, 4096, 128, 4), (300, 28672, 4096, 128, 4),
    (512, 28672, 4096, 128, 4), (4096, 28672, 4096, 128, 4), (512, 4096, 4096, 128, 4), (1000, 4096, 4096, 128, 4),
    (1024, 28672, 4096, 128, 8), (256, 6144, 4096, 128, 8), (256, 6144, 4096, 32, 4), (512, 28672, 4096, 32, 4),
    (256, 6144, 4096, -1, 4),
]  # fmt: skip


def use(body: Optional[LoopBody]) -> None:
    """Let launches of this process have ``body``, with fewer blocks where they do not divide K; None: by rule."""

    def forced(tile, scales, int8, blocks, groups=1, ahead=True):
        if body is None or tile.kernel != "cooperative":
            return RULE(tile, scales, int8, blocks, groups, ahead)
        unroll = body.unroll
        while blocks % unroll:
            unroll //= 2
        return LoopBody(unroll, body.ahead and unroll > 1)

    gluon_launch.loop_body = forced


def fitted(tile: Tile, shape: Shape) -> Tile:
    """With the stages that fit, as the launcher takes them."""
    schedule = shape.schedule.partition("/")[0]
    return for_output(deepest(tile, schedule), schedule, 2, scales_in_block(shape.group_size))


def compile_form(shape: Shape, tile: Tile, body: Optional[LoopBody]) -> None:
    """Run a small problem of the same kernel; Triton's cache on disk carries it to the process that measures."""
    use(body)
    Problem(Shape(256, shape.k, *shape.format), 16).linear(tile, 0)
    torch.cuda.synchronize()


def measure(bench: GpuBench, shape: Shape, m: int, compared: list[Form]) -> dict[str, float]:
    """Microseconds of each form; those whose output is another are printed and left out."""
    bench.load(shape, m)
    problem, graphs, expected = bench._loaded(), {}, None
    for tile, body in compared:
        use(body)
        name = (
            f"{tile.kernel} {tile.block_m}x{tile.block_n} K/{tile.split_k} p{tile.programs_per_sm} {tuple(body or ())}"
        )
        for _ in range(2):  # the counters of parts of K have to be zero again after the first
            y = problem.linear(fitted(tile, shape), 0)
        expected = y.clone() if expected is None else expected
        if not torch.equal(y, expected):
            print(f"WRONG {shape} {m} {name}", flush=True)
            continue
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for copy in range(len(problem.weights)):
                problem.linear(fitted(tile, shape), copy)
    for graph in graphs.values():
        replay_ms(graph)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(9):
        for name, graph in graphs.items():
            samples[name].append(replay_ms(graph))
    return {name: statistics.median(found) * 1e3 / len(problem.weights) for name, found in samples.items()}


def main() -> None:
    """Compile in parallel, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=170)
    end = time.monotonic() + parser.parse_args().seconds
    shapes = [(m, Shape(n, k, group_size, bits, 4)) for m, n, k, group_size, bits in PROBLEMS]
    compared = [forms(m, s.n, s.scale_bits, s.group_size) for m, s in shapes]
    jobs = {
        (s.k, *s.format, fitted(tile, s), body): (s, fitted(tile, s), body)
        for (_, s), found in zip(shapes, compared)
        for tile, body in found
    }
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.starmap(compile_form, jobs.values(), chunksize=1)
    bench = GpuBench()
    for (m, shape), found in zip(shapes, compared):
        if time.monotonic() > end:
            break
        times = {"fp8": fp8_us(m, shape.n, shape.k)} | measure(bench, shape, m, found)
        print(
            f"{shape.n}x{shape.k} {shape.format} {m}: ", {name: round(us, 2) for name, us in times.items()}, flush=True
        )
    bench.close()


if __name__ == "__main__":
    main()
