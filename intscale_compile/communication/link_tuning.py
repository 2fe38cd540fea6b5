"""``tune_link``: time plain and quantized collectives on a live process group and store the times for the compiler.

As a command, one process a rank:

    torchrun --nproc-per-node 2 -m intscale_compile.communication --seconds 120

``intscale tune --link`` starts the ranks of one host itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CommunicationError, ConfigError, IntScaleError
from ..reasons import log_once
from . import symmetric
from .choice import Allowed, plan
from .link_cost import thresholds
from .link_table import (
    LOSSLESS,
    ONE_SHOT,
    OPS,
    PLAIN,
    TWO_SHOT,
    Key,
    Link,
    Times,
    check_table,
    link_of,
    read_table,
    table_path,
    write_table,
)
from .message import WireFormat
from .ops import ALL_GATHER_OP, ALL_REDUCE_OP, REDUCE_SCATTER_OP
from .transport import all_gather_tensor, reduce_scatter_tensor

SIZES = tuple(1 << power for power in range(13, 29))  # bytes: 8 KB to 256 MB
MOST_ONE_SHOT = 1 << 20  # bytes; above, a message does not go in one step
WIRES = ("int8", "int6", "int5", "int4")
REPEATS = 5  # of which the median counts
REPEAT_SECONDS = 0.02  # of calls in one repeat, at most MOST_CALLS of them
MOST_CALLS = 20
SPIN_CYCLES = 1_000_000  # about half a millisecond of a GPU, in which the host queues what is timed


def tune_link(
    group: Optional[dist.ProcessGroup] = None,
    wires: Sequence[str] = WIRES,
    sizes: Iterable[int] = SIZES,
    *,
    ops: Sequence[str] = OPS,
    device: Union[None, str, torch.device] = None,
    path: Union[None, str, os.PathLike] = None,
    seconds: Optional[float] = None,
    progress: bool = True,
) -> Times:
    """Measure a link and store the times: models compiled afterwards take their thresholds from them.

    Every rank of the group calls this at the same time, with nothing else running on its device. The time of a call is the
    slowest rank's, and every rank gets the same times; one process of each host writes them. On GPUs it is the time in a
    captured CUDA graph, without the host's part.

    Args:
        group: process group; the default group if None.
        wires: wire formats to measure beside the plain collective.
        sizes: bytes of the whole tensor, which is bf16.
        ops: of ``"all_reduce"``, ``"reduce_scatter"``, ``"all_gather"``.
        device: where the tensors are; the default is the current GPU where the group has a backend for it, else the CPU.
        path: file to write, merged with what it holds; the default is the one that is read (``link_table``).
        seconds: budget; sizes that it does not reach are said and keep their former entries.
        progress: print a line for each size, on rank 0.

    Returns:
        Microseconds by bytes, for each collective and form.

    Raises:
        CommunicationError: there is no process group, or it has one rank.
        ConfigError: a wire format, size or collective is not supported; or, on every rank, one of them cannot write its
            table, or the table to merge with is malformed.
    """
    if not dist.is_initialized():
        raise CommunicationError("tune_link: call torch.distributed.init_process_group first.")
    group = dist.group.WORLD if group is None else group
    assert group is not None
    if group.size() < 2:
        raise CommunicationError("tune_link: the group has one rank: there is no link to measure.")
    wires, sizes = checked(wires, sizes, ops, group.size())
    where = _device(group) if device is None else torch.device(device)
    link, show = link_of(group, where), progress and group.rank() == 0
    bench = _Bench(group, where)
    target = table_path(link) if path is None else Path(path)
    writes = os.environ.get("LOCAL_RANK", "0") == "0" or group.rank() == 0
    with bench.failing_together():
        if writes:
            check_table(target, link)
    times, left = _measured(bench, ops, wires, sizes, seconds, show)
    with bench.failing_together():
        if writes:
            write_table(target, link, {"torch": torch.__version__, "date": _today()}, times)
    if show:
        _summary(link, left, seconds, target)
    return times


def _measured(
    bench: _Bench, ops: Sequence[str], wires: Sequence[str], sizes: Iterable[int], seconds: Optional[float], show: bool
) -> tuple[Times, list[int]]:
    """Times of all collectives and forms, and the sizes that the budget of seconds did not reach."""
    times: Times = {}
    left: list[int] = []
    start = time.monotonic()
    for nbytes in sizes:
        if seconds is not None and bench.agreed(time.monotonic() - start) > seconds:
            left.append(nbytes)
            continue
        for op in ops:
            found = bench.times(op, wires, nbytes)
            for form, us in found.items():
                times.setdefault(Key(op, form), {})[nbytes] = round(us, 2)
            if show:
                print(_line(op, nbytes, found), flush=True)
    return times, left


def checked(wires: Sequence[str], sizes: Iterable[int], ops: Sequence[str], ranks: int) -> tuple[list[str], list[int]]:
    """Names of the wire formats, and sizes that divide evenly among the ranks.

    Raises:
        ConfigError: one of them, or one of ``ops``, is not supported.
    """
    names = [str(WireFormat.parse(wire)) for wire in wires]
    found = sorted(set(sizes))
    least = 2 * ranks * 128  # a group of every wire format on every rank
    if not found or not all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in found):
        raise ConfigError(f"tune_link: sizes={found!r} are not supported: use integers of at least {least} bytes.")
    if any(op not in OPS for op in ops) or not ops:
        raise ConfigError(f"tune_link: ops={tuple(ops)!r} are not supported: use some of {OPS}.")
    return names, [n // (2 * ranks) * (2 * ranks) for n in found]


def _device(group: dist.ProcessGroup) -> torch.device:
    kinds = {device.type for device in group._device_types}
    if "cuda" in kinds and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class _Bench:
    """Times of collectives on one group; the same numbers on every rank."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self._flag = torch.zeros(1, device=device)
        self._restore: Callable[[], Any] = lambda: None  # what a collective in place has overwritten

    def agreed(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        value = torch.tensor([number], dtype=torch.float32, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return float(value)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """What one rank cannot do fails on every rank: no rank waits for one that has left."""
        failed: Optional[IntScaleError] = None
        try:
            yield
        except IntScaleError as error:
            failed = error
        together = self.agreed(float(failed is not None)) > 0
        if failed is not None:
            raise failed
        if together:
            raise ConfigError("tune_link: another rank cannot write its table of this link: its own message says why.")

    def times(self, op: str, wires: Sequence[str], nbytes: int) -> dict[str, float]:
        """Median microseconds of the plain collective, the lossless ones where they can run and each wire format, in turn."""
        self._restore = lambda: None
        calls = {PLAIN: self._plain(op, nbytes), **self._lossless(op, nbytes)}
        calls |= {wire: self._quantized(op, wire, nbytes) for wire in wires}
        repeats = {form: self._repeat(call) for form, call in calls.items()}
        rounds = [{form: repeat() for form, repeat in repeats.items()} for _ in range(REPEATS)]
        return {form: statistics.median(one[form] for one in rounds) * 1e6 for form in calls}

    def _repeat(self, call: Callable[[], Any]) -> Callable[[], float]:
        """What times a call once more, in seconds: the mean of several calls, in a CUDA graph where there is a GPU."""
        self._on_the_clock(call, 1)  # kernels are compiled
        count = max(1, min(MOST_CALLS, int(REPEAT_SECONDS / max(self._on_the_clock(call, 1), 1e-7))))
        graph = self._captured(call, count) if self.device.type == "cuda" else None
        if graph is None:
            return lambda: self._on_the_clock(call, count)
        return lambda: self._replayed(graph, count)

    def _on_the_clock(self, call: Callable[[], Any], count: int) -> float:
        self._restore()
        dist.barrier(self.group)
        self._synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self._synchronize()
        return self.agreed(time.perf_counter() - start) / count

    def _captured(self, call: Callable[[], Any], count: int) -> Optional[torch.cuda.CUDAGraph]:
        """A CUDA graph of so many calls; None on every rank where one of them could not capture it."""
        graph, failed = torch.cuda.CUDAGraph(), False
        self._synchronize()
        dist.barrier(self.group)
        try:
            # the watchdog of NCCL asks for its events meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for _ in range(count):
                    call()
        except RuntimeError as error:
            failed = True
            log_once(logging.WARNING, f"tune_link: timed without CUDA graphs, the host's part included: {error}")
        return None if self.agreed(float(failed)) else graph

    def _replayed(self, graph: torch.cuda.CUDAGraph, count: int) -> float:
        self._restore()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)
        dist.all_reduce(self._flag, group=self.group)  # the GPUs meet; the host does not wait
        begin.record()
        graph.replay()
        end.record()
        self._synchronize()
        return self.agreed(begin.elapsed_time(end) / 1e3) / count

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _tensor(self, nbytes: int) -> Tensor:
        return torch.randn(nbytes // 2, device=self.device, dtype=torch.bfloat16)

    def _plain(self, op: str, nbytes: int) -> Callable[[], Any]:
        """In place or into a tensor that is there, as Inductor generates it."""
        ranks, group = self.group.size(), self.group
        if op == "all_reduce":
            # Each call in place grows the numbers by the number of ranks at most: small ones stay finite for MOST_CALLS.
            source = self._tensor(nbytes) * 2.0**-60
            whole = source.clone()
            self._restore = lambda: whole.copy_(source)
            return lambda: dist.all_reduce(whole, group=group)
        whole, part = self._tensor(nbytes), self._tensor(nbytes // ranks)
        if op == "reduce_scatter":
            return lambda: reduce_scatter_tensor(part, whole, group=group)
        return lambda: all_gather_tensor(whole, part, group=group)

    def _lossless(self, op: str, nbytes: int) -> dict[str, Callable[[], Any]]:
        if op != "all_reduce" or self.device.type != "cuda" or not symmetric.usable(self.group, self.device):
            return {}
        whole = self._tensor(nbytes)
        calls = {TWO_SHOT: lambda: symmetric.two_shot(whole, self.group)}
        return {ONE_SHOT: lambda: symmetric.one_shot(whole, self.group), **calls} if nbytes <= MOST_ONE_SHOT else calls

    def _quantized(self, op: str, wire: str, nbytes: int) -> Callable[[], Any]:
        ranks, name = self.group.size(), self.group.group_name
        if op == "all_gather":
            part = self._tensor(nbytes // ranks)
            return lambda: ALL_GATHER_OP(part, wire, ranks, name)
        whole = self._tensor(nbytes)
        if op == "reduce_scatter":
            return lambda: REDUCE_SCATTER_OP(whole, wire, ranks, name)
        return lambda: ALL_REDUCE_OP(whole, wire, name)


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _line(op: str, nbytes: int, found: dict[str, float]) -> str:
    plain = found[PLAIN]
    others = ", ".join(f"{form} {us:.1f} ({plain / us:.2f}x)" for form, us in found.items() if form != PLAIN)
    return f"{op} {nbytes:>11,} bytes: plain {plain:.1f} us, {others}"


def _summary(link: Link, left: list[int], seconds: Optional[float], target: Path) -> None:
    """What compiled models go by from now on: the whole table, with what it held before."""
    times = read_table(target)[1]
    found = thresholds(link, times)
    if any(key.wire in LOSSLESS for key in times):
        print(
            f'tune_link: an all-reduce with communication="auto": {plan(link, times, Allowed.parse("auto"))}',
            flush=True,
        )
    for op in dict.fromkeys(key.op for key in found):
        words = ", ".join(f"{key.wire} {least}" for key, least in found.items() if key.op == op)
        print(f"tune_link: {op} is quantized from so many bytes on: {words}", flush=True)
    if left:
        print(f"tune_link: the {seconds} s are over; left out: {', '.join(f'{n:,}' for n in left)} bytes", flush=True)
    print(f"tune_link: {link} written to {target}", flush=True)


@contextlib.contextmanager
def process_group(backend: Optional[str] = None) -> Iterator[None]:
    """The default group, made from the variables that torchrun sets; by default NCCL where there are GPUs, else gloo."""
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Command line of :func:`tune_link`: the default group, made from the variables that torchrun sets."""
    parser = argparse.ArgumentParser(
        prog="torchrun -m intscale_compile.communication", description="Time collectives between these ranks."
    )
    parser.add_argument("--backend", help="of the process group; default: nccl where there are GPUs, else gloo")
    parser.add_argument("--wires", nargs="+", default=WIRES, metavar="FORMAT")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="BYTES")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--path", help="table to write; default: the one that is read")
    parser.add_argument("--seconds", type=float, help="budget")
    args = parser.parse_args(arguments)
    try:
        with process_group(args.backend):
            tune_link(wires=args.wires, sizes=args.sizes, ops=args.ops, path=args.path, seconds=args.seconds)
    except IntScaleError as error:
        sys.exit(f"error: {error}")
