"""What tuning does on the GPU: build a problem, compile tiles in parallel, check them bit for bit, time them.

A timing is that of ``w4a8_linear`` with its epilogue, in a CUDA graph of one call per copy of the weight; the copies exceed
the L2 cache together, so none is found there. The GPU spins before each replay, so that launching it is not timed.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor

from .. import format as fmt
from ..errors import ConfigError
from .gluon_tiles import gluon_candidates
from .tile import Tile, schedule_name, table_schedule
from .tiles import FEW_TOKENS, choose_tile, few_tokens_tile

WORKERS = 16
COPY_BYTES = 3e9  # of all copies of one weight
CHECK_TOKENS = 1024
SPIN_CYCLES = 200_000  # about 0.1 ms, more than the host takes to queue two events and a replay


@dataclass(frozen=True)
class Shape:
    """A weight ``[n, k]`` and its format."""

    n: int
    k: int
    group_size: int = 128
    scale_bits: int = 4
    weight_bits: int = 4

    @property
    def format(self) -> tuple[int, int, int]:
        """Group size, scale bits, weight bits."""
        return self.group_size, self.scale_bits, self.weight_bits

    @property
    def schedule(self) -> str:
        """As the tables key it."""
        return table_schedule(*self.format)


@dataclass(frozen=True)
class Job:
    """A tile to compile for a problem."""

    shape: Shape
    m: int
    tile: Tile

    def small(self) -> Job:
        """A small problem for which Triton compiles the very same kernels: it specializes on 1 and on multiples of 16."""
        n = 256 + self.shape.n % 16
        m = 1 if self.m == 1 and self.tile.kernel == "triton" else 16 if self.m % 16 == 0 else 17
        return Job(replace(self.shape, n=n), m if self.tile.kernel == "triton" else 16, self.tile)


class Problem:
    """Random operands on the current GPU, tiled packing, with ``copies`` of the weight."""

    def __init__(self, shape: Shape, m: int, copies: int = 1):
        self.shape = shape
        rows, columns = fmt.padded_out_features(shape.n), fmt.padded_in_features(shape.k, shape.group_size)
        groups = fmt.num_groups(shape.k, shape.group_size)
        random = functools.partial(torch.randint, device="cuda")
        if shape.weight_bits == 8:
            qdata = random(-127, 128, (rows, columns), dtype=torch.int8)
        else:
            qdata = random(0, 256, (rows, columns // 2), dtype=torch.uint8)
        top = 2 if shape.group_size == -1 else 1 << shape.scale_bits
        scale = random(1, top, (rows, groups), dtype=torch.uint8 if top <= 256 else torch.int16)
        self.weights = [(qdata, scale), *((qdata.clone(), scale.clone()) for _ in range(copies - 1))]
        self.row_scale = torch.full((shape.n, 1), 1e-3, device="cuda")
        self.set_tokens(m)

    def set_tokens(self, m: int) -> None:
        """Exchange the activations for ``m`` others."""
        self.xq = torch.randint(-127, 128, (m, self.shape.k), device="cuda", dtype=torch.int8)
        self.token_scale = torch.full((m, 1), 1e-3, device="cuda")

    def accumulate(self, tile: Tile, rows: int) -> Tensor:
        """Integer accumulator of the first ``rows`` tokens, int32 ``[rows, n]``."""
        # Imports Triton, which only GPUs need.
        from .triton_gemm import accumulate_cuda

        s = self.shape
        return accumulate_cuda(
            self.xq[:rows], *self.weights[0], s.n, s.group_size, s.scale_bits, "tiled", tile=tile, overlap=False
        )

    def linear(self, tile: Tile, copy: int) -> Tensor:
        """bf16 output ``[m, n]`` of one copy of the weight."""
        # Imports Triton, which only GPUs need.
        from .triton_gemm import linear_cuda

        s, (qdata, scale) = self.shape, self.weights[copy]
        return linear_cuda(
            self.xq, self.token_scale, qdata, scale, self.row_scale, None, s.n, s.group_size, s.scale_bits, "tiled",
            torch.bfloat16, tile=tile, overlap=True,
        )  # fmt: skip


def compile_job(device: int, job: Job) -> None:
    """Compile what a job needs by running it on a small problem; in a worker, Triton's disk cache carries it over."""
    torch.cuda.set_device(device)
    small = job.small()
    problem = Problem(small.shape, small.m)
    problem.accumulate(job.tile, small.m)
    problem.linear(job.tile, 0)
    torch.cuda.synchronize()


def plain_candidates(m: int, shape: Shape, capability: int, sweep: bool) -> list[Tile]:
    """Tiles of plain Triton: the rule's with all of K; with ``sweep`` what the rules choose first, and others near it."""
    tiles = [choose_tile(m, shape.n, shape.k, *shape.format, capability)]
    if sweep:
        if few := few_tokens_tile(m, shape.n, shape.k, *shape.format):
            tiles.insert(0, few)
        natural = min(128, max(16, 1 << (m - 1).bit_length()))
        for bm, bn, stages in itertools.product({natural, max(16, natural // 2)}, (64, 128), (3, 5)):
            tiles += [Tile(bm, bn, warps, stages) for warps in ((4, 8) if bm * bn >= 64 * 128 else (4,))]
            if m <= FEW_TOKENS:
                tiles += [Tile(bm, bn, num_stages=stages, split_k=parts) for parts in (2, 4, 8)]
    return list(dict.fromkeys(tiles))


class GpuBench:
    """Candidates, checks and timings on the current GPU.

    Raises:
        ConfigError: there is no GPU.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(
                "tune times kernels and needs a GPU, PyTorch sees none: run it on the machine to tune for."
            )
        # Imports Triton, which only GPUs need.
        from .triton_gemm import capability

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.device_name, self.sm_count = torch.cuda.get_device_name(), properties.multi_processor_count
        self.capability, self._l2 = capability(self.device), properties.L2_cache_size
        self._problem: Optional[Problem] = None
        self._expected: Optional[Tensor] = None
        self._graphs: dict[Tile, torch.cuda.CUDAGraph] = {}
        self._compiled: set[Job] = set()
        self._pool: Optional[concurrent.futures.ProcessPoolExecutor] = None
        self._serial = min(WORKERS, os.cpu_count() or 1) < 2

    def candidates(self, shape: Shape, m: int) -> list[Tile]:
        """Tiles to try, that of the rules first."""
        # Imports Triton, which only GPUs need.
        from .triton_gemm import gluon_obstacle

        obstacle = gluon_obstacle(shape.k, *shape.format, "tiled", self.device)
        plain = plain_candidates(m, shape, self.capability, sweep=obstacle is not None)
        if obstacle:
            return plain
        name, decode = schedule_name(*shape.format), shape.group_size != 256
        return gluon_candidates(m, shape.n, shape.k, name, self.sm_count, decode=decode) + plain

    def compile(self, jobs: Iterable[Job], seconds: Optional[float] = None) -> None:
        """Compile in parallel processes, for at most ``seconds``; what fails or is left compiles at its first launch."""
        wanted = {job.small(): job for job in jobs}
        new = [job for key, job in wanted.items() if key not in self._compiled]
        self._compiled.update(wanted)
        if self._serial or len(new) < 2:
            return
        try:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                workers = min(WORKERS, os.cpu_count() or 1)
                self._pool = concurrent.futures.ProcessPoolExecutor(workers, context)
            futures = [self._pool.submit(compile_job, self.device.index, job) for job in new]
            done, left = concurrent.futures.wait(futures, timeout=seconds)
            for future in left:
                future.cancel()
            if any(isinstance(future.exception(), concurrent.futures.BrokenExecutor) for future in done):
                self._serial = True
        except (OSError, RuntimeError):
            self._serial = True

    def load(self, shape: Shape, m: int) -> None:
        """Make ``(shape, m)`` the problem of the calls that follow."""
        self._graphs.clear()
        self._expected = None
        if self._problem is None or self._problem.shape != shape:
            self._problem = None
            torch.cuda.empty_cache()
            nbytes = fmt.padded_out_features(shape.n) * shape.k * shape.weight_bits // 8
            copies = max(1, min(max(2, 2 * self._l2 // nbytes + 1), int(COPY_BYTES // nbytes)))
            self._problem = Problem(shape, m, copies)
        else:
            self._problem.set_tokens(m)

    def fault(self, tile: Tile) -> Optional[str]:
        """Why ``tile`` cannot be used, or None: it does not launch, or its accumulator is not the plain-Triton kernel's."""
        problem = self._loaded()
        rows = min(CHECK_TOKENS, problem.xq.shape[0])
        if self._expected is None:
            plain = plain_candidates(rows, problem.shape, self.capability, sweep=False)[0]
            self._expected = problem.accumulate(plain, rows)
        try:
            # Twice: the counters of split K have to be zero again after the first.
            same = all(torch.equal(problem.accumulate(tile, rows), self._expected) for _ in range(2))
            problem.linear(tile, 0)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  (whatever a compiler says about a tile that it cannot do)
            torch.cuda.synchronize()  # an error that has broken the GPU context shows again here, and ends the tuning
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None if same else "its accumulator is wrong"

    def times(self, tiles: Sequence[Tile], replays: int) -> dict[Tile, float]:
        """Median microseconds of one call for each tile; replays take turns. Other tiles' graphs are freed."""
        problem = self._loaded()
        for tile in [tile for tile in self._graphs if tile not in tiles]:
            del self._graphs[tile]
        copies = len(problem.weights)
        for tile in tiles:
            if tile not in self._graphs:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for copy in range(copies):
                        problem.linear(tile, copy)
                self._graphs[tile] = graph
        for tile in tiles:
            replay_ms(self._graphs[tile])
        samples: dict[Tile, list[float]] = {tile: [] for tile in tiles}
        for _ in range(replays):
            for tile in tiles:
                samples[tile].append(replay_ms(self._graphs[tile]))
        return {tile: statistics.median(found) * 1e3 / copies for tile, found in samples.items()}

    def _loaded(self) -> Problem:
        if self._problem is None:
            raise RuntimeError("load a problem first")
        return self._problem

    def close(self) -> None:
        """End the compiling processes and free the problem."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._graphs.clear()
        self._problem = self._expected = self._pool = None

    def clock(self) -> float:
        """Seconds, for the budget."""
        return time.monotonic()

    def versions(self) -> dict[str, Any]:
        """Versions that a table names."""
        # Only GPUs need Triton.
        import triton

        return {"torch": torch.__version__, "triton": triton.__version__}


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
