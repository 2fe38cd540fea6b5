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

from intscale_compile.communication.message import GROUP_SIZE, Elements

from .stress import DTYPES

MOST_SMALL = 132 * 2048  # elements of a slice, about: with more a program takes larger chunks
LINE = 200  # characters of an error
LOSSLESS = "lossless"  # in place of a wire format


def compile_ahead(args: argparse.Namespace) -> list[str]:
    """Compile what a run with these arguments launches; what failed, which the ranks will compile for themselves."""
    dtypes = args.dtypes if args.stress else ["bfloat16"]
    kinds = [(nbytes // 2, 0) for nbytes in args.sizes[:1] + args.sizes[-1:]]
    kinds += stress_inputs(args.ranks, args.most) if args.stress else []
    fused = args.link == "nvlink"
    wires = [*args.wires, *([LOSSLESS] if fused else [])]
    jobs = list(itertools.product(range(args.ranks), wires, dtypes, dict.fromkeys(kinds)))
    failures = []
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        found = {pool.submit(compile_rank, *job, args.ranks, fused): job for job in jobs}
        for future in concurrent.futures.as_completed(found):
            if error := future.exception():
                failures.append(f"{found[future]}: {type(error).__name__}: {error}"[:LINE])
    return failures


def stress_inputs(ranks: int, most: int | None = None) -> list[tuple[int, int]]:
    """Numbers of elements, and how many elements behind an aligned address they begin, that Triton compiles differently.

    Multiples of 16 or not, these at an aligned address or not; of small and of large chunks.
    """
    small, large = GROUP_SIZE * 3 * ranks, 2 * MOST_SMALL * ranks
    sizes = (small, large) if most is None or most // 2 > MOST_SMALL * ranks else (small,)
    return [(n - less, offset) for n in sizes for less, offset in ((0, 0), (2, 0), (2, 2))]


def compile_rank(rank: int, wire: str, dtype: str, kind: tuple[int, int], ranks: int, fused: bool) -> None:
    """Compile the kernels of one rank and wire format for one kind of input."""
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
    space = symmetric.Workspace(
        torch.zeros(64, dtype=torch.uint8, device="cuda"),
        torch.zeros(ranks, dtype=torch.int64, device="cuda"),
        torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device="cuda"),
        None,
    )
    symmetric._workspace = symmetric.fixed_workspace = lambda group, device, *sizes: space
    number, offset = kind
    x, group = torch.empty(offset + number, dtype=getattr(torch, dtype), device="cuda")[offset:], dist.group.WORLD
    try:
        if wire == LOSSLESS:
            symmetric.one_shot(x, group)
            symmetric.two_shot(x, group)
            if x.dtype in symmetric.LOSSLESS_DTYPES:
                symmetric.all_reduce(x, Elements(), group)
        else:
            transport.all_reduce(x, WireFormat.parse(wire), group)
            if fused:
                symmetric.all_reduce(x, WireFormat.parse(wire), group)
    finally:
        JITFunction.run = launch
