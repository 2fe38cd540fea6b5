"""``intscale tune --link``: the ranks of one host, started here unless torchrun did, time the link between them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from ..communication.link_cost import NEVER, thresholds
from ..communication.link_table import OPS, Link, check_table, link_of, read_table, table_path
from ..communication.link_tuning import SIZES, WIRES, checked, process_group, tune_link
from ..errors import ConfigError
from ..kernels.tile_tables import device_slug
from .loading import usable_device

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
GRACE_SECONDS = 10.0  # for the other ranks to fail by themselves, once one has


@dataclass(frozen=True)
class LinkRun:
    """What to measure.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        wires, sizes, ops, path, seconds: as for ``tune_link``.
    """

    device: str
    wires: Sequence[str] = WIRES
    sizes: Sequence[int] = SIZES
    ops: Sequence[str] = OPS
    path: Optional[Path] = None
    seconds: Optional[float] = None

    def arguments(self) -> list[str]:
        """The same as options of ``intscale tune --link``."""
        lists = {"--wire": self.wires, "--bytes": self.sizes, "--op": self.ops}
        words = [word for name, values in lists.items() for value in values for word in (name, str(value))]
        single = {"--device": self.device, "--path": self.path, "--seconds": self.seconds}
        return words + [word for name, value in single.items() if value is not None for word in (name, str(value))]


def is_rank() -> bool:
    """Whether this process is one of several already: torchrun started it, or it has a process group."""
    return dist.is_initialized() or all(name in os.environ for name in RANK_VARIABLES)


def usable_ranks(device: str, ranks: Optional[int]) -> tuple[str, int]:
    """The kind of device and how many ranks to start on this host.

    Raises:
        ConfigError: there are fewer than two, or fewer GPUs than ranks.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device!r} has no link between ranks: use cuda (one rank a GPU) or cpu.")
    if device == "cpu" and ranks is None:
        raise ConfigError("--device cpu: say how many processes the link joins, such as --ranks 2.")
    if device == "cpu":
        count = gpus = ranks or 0
    else:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        count = gpus if ranks is None else ranks
    if gpus < 2 and device != "cpu":
        found = "one GPU" if gpus else "no GPU"
        raise ConfigError(
            f"PyTorch sees {found} here, so no link between GPUs: --device cpu --ranks 2 measures gloo between processes."
        )
    if count > gpus:
        raise ConfigError(f"--ranks {count} is more than the {gpus} GPUs that PyTorch sees: NCCL takes one rank a GPU.")
    if count < 2:
        raise ConfigError(f"--ranks {count}: a link joins at least two.")
    return ("cpu" if device == "cpu" else "cuda"), count


def rank_device(device: str) -> str:
    """``"cuda"`` or ``"cpu"``, for a process that is one of the ranks."""
    if device != "auto":
        return usable_device(device).type
    return "cuda" if torch.cuda.is_available() else "cpu"


def tune_this_rank(run: LinkRun) -> Optional[dict[str, Any]]:
    """Measure as one of the ranks; returns what was found, for JSON, on rank 0 and None elsewhere.

    Raises:
        CommunicationError, ConfigError: as for ``tune_link``.
    """
    backend = "nccl" if run.device == "cuda" else "gloo"
    with contextlib.nullcontext() if dist.is_initialized() else process_group(backend):
        device = torch.device("cpu") if run.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        times = tune_link(None, run.wires, run.sizes, ops=run.ops, device=device, path=run.path, seconds=run.seconds)
        if dist.get_rank():
            return None
        group = dist.group.WORLD
        assert group is not None
        link = link_of(group, device)
        path = run.path or table_path(link)
    rows = [{**key._asdict(), "bytes": n, "us": us} for key, found in times.items() for n, us in found.items()]
    return {"link": str(link), "path": str(path), "thresholds": threshold_rows(link, path), "times": rows}


def threshold_rows(link: Link, path: Path) -> list[dict[str, Any]]:
    """The thresholds of a table as plain values; ``bytes`` is None where a quantized collective never pays."""
    found = thresholds(link, read_table(path)[1])
    return [
        {**key._asdict(), "bytes": None if least.nbytes == NEVER else least.nbytes, "source": least.source}
        for key, least in found.items()
    ]


def launch(run: LinkRun, ranks: int, more: Sequence[str] = ()) -> int:
    """Start ``intscale tune --link`` once for each rank of this host; returns the exit code of the first that failed.

    Rank 0 writes where this process does. A rank that fails takes the others with it.

    Args:
        run: what to measure; what is wrong with it is said before anything starts.
        ranks: how many.
        more: further options for rank 0.

    Raises:
        ConfigError: a wire format, size or collective is not supported, or the table cannot be written.
    """
    checked(run.wires, run.sizes, run.ops, ranks)
    name = device_slug(torch.cuda.get_device_name(0)) if run.device == "cuda" else "cpu"
    link = Link("nccl" if run.device == "cuda" else "gloo", name, ranks)
    check_table(run.path or table_path(link), link)
    command = [sys.executable, "-m", "intscale_cli", "tune", "--link", *run.arguments()]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port of its own choice
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    shared = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}" for rank in range(ranks)]
        with _processes(command, list(more), shared, logs) as processes:
            failed = _first_failure(processes)
        if failed is None:
            return 0
        if failed:
            sys.stderr.write(logs[failed].read_text(errors="replace"))
        return abs(processes[failed].returncode)


@contextlib.contextmanager
def _processes(
    command: list[str], more: list[str], shared: dict[str, str], logs: Sequence[Path]
) -> Iterator[list[subprocess.Popen]]:
    """One process a rank; those that still run in the end are stopped."""
    running: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                running.append(subprocess.Popen([*command, *more], env=environment))
                continue
            with open(log, "w") as file:
                quiet = {"stdout": subprocess.DEVNULL, "stderr": file}
                running.append(subprocess.Popen(command, env=environment, **quiet))  # type: ignore[call-overload]
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def _first_failure(processes: Sequence[subprocess.Popen]) -> Optional[int]:
    """The rank whose process failed, the lowest of those that failed together; None once all have ended well."""
    end = None
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and end is None:
            end = time.monotonic() + GRACE_SECONDS
        if None not in codes or (end is not None and time.monotonic() > end):
            return failed[0] if failed else None
        time.sleep(0.05)
