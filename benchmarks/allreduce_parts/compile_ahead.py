"""Compiling the Triton kernels of every rank and wire format at once, before ranks wait for each other.

Each process is one rank of a group that does not exist (PyTorch's fake backend), and runs the collectives with kernels that
are compiled and not launched; the ranks find them in Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os

from intscale_compile.communication.message import GROUP_SIZE

from .stress import DTYPES

LINE = 200  # characters of an error


def compile_ahead(args: argparse.Namespace) -> list[str]:
    """Compile what a run with these arguments launches; what failed, which the ranks will compile for themselves."""
    dtypes = args.dtypes if args.stress else ["bfloat16"]
    elements = [nbytes // 2 for nbytes in args.sizes] + (stress_elements(args.ranks) if args.stress else [])
    jobs = list(itertools.product(range(args.ranks), args.wires, dtypes))
    fused = args.link == "nvlink"
    failures = []
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        found = {pool.submit(compile_rank, *job, args.ranks, elements, fused): job for job in jobs}
        for future in concurrent.futures.as_completed(found):
            if error := future.exception():
                failures.append(f"{found[future]}: {type(error).__name__}: {error}"[:LINE])
    return failures


def stress_elements(ranks: int) -> list[int]:
    """Numbers of elements that Triton compiles differently: multiples of 16 or not, one group, 16 groups, others."""
    slices = [groups * GROUP_SIZE * ranks for groups in (1, 3, 16)]
    return [*slices, *(elements - 1 for elements in slices)]


def compile_rank(rank: int, wire: str, dtype: str, ranks: int, elements: list[int], fused: bool) -> None:
    """Compile the kernels of one rank and wire format."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from triton.runtime.jit import JITFunction

    from intscale_compile.communication import symmetric, transport
    from intscale_compile.communication.fused_kernel import MOST_PROGRAMS
    from intscale_compile.communication.message import WireFormat

    assert dtype in DTYPES
    launch = JITFunction.run
    JITFunction.run = lambda self, *a, grid, warmup, **k: launch(self, *a, grid=grid, warmup=True, **k)
    if not dist.is_initialized() or dist.get_rank() != rank:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    parsed = WireFormat.parse(wire)
    space = symmetric.Workspace(
        torch.zeros(64, dtype=torch.uint8, device="cuda"),
        torch.zeros(ranks, dtype=torch.int64, device="cuda"),
        torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device="cuda"),
        None,
    )
    symmetric._workspace = symmetric.fixed_workspace = lambda group, device, *sizes: space
    try:
        for number in elements:
            x = torch.empty(number, dtype=getattr(torch, dtype), device="cuda")
            transport.all_reduce(x, parsed, dist.group.WORLD)
            if fused:
                symmetric.all_reduce(x, parsed, dist.group.WORLD)
                symmetric.one_shot(x, dist.group.WORLD)
                symmetric.two_shot(x, dist.group.WORLD)
    finally:
        JITFunction.run = launch
