"""Ranks of the benchmarks that need several: started by the script itself, or already there (torchrun, ``slow_link.py``)."""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # ``slow_link.py`` needs no PyTorch
    import torch

# What keeps NCCL off the faster links between the GPUs of one host.
LINKS = {
    "nvlink": {},
    "host": {"NCCL_P2P_DISABLE": "1"},  # through the memory of the host: PCIe
    "socket": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
# Multicast over NVLink can take the GPUs of a shared host out of service.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
SHAPED = "INTSCALE_SHAPED_LINK"  # what ``slow_link.py`` tells its ranks about the link
TIMEOUT = datetime.timedelta(seconds=120)  # of a collective


def is_rank() -> bool:
    """Whether this process is one of the ranks."""
    return "RANK" in os.environ


def check_ranks_and_wires(parser: argparse.ArgumentParser, args: argparse.Namespace, auto: bool = False) -> None:
    """End the program unless there are at least two ranks and ``--wires`` names wire formats; those by their own names.

    ``auto``: whether ``"auto"`` and ``"auto+FORMAT"`` are allowed, too.
    """
    from intscale_compile.communication.choice import Allowed
    from intscale_compile.communication.message import WireFormat

    try:
        args.wires = [str((Allowed if auto else WireFormat).parse(wire)) for wire in args.wires]
    except ValueError as error:
        parser.error(str(error))
    if args.ranks < 2:
        parser.error("--ranks must be at least 2")


def launch(ranks: int, seconds: float) -> int:
    """Run this command once for each rank on this host; the exit status of the first that fails, else 0.

    All are killed when one fails, and after ``seconds``.
    """
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *sys.argv]
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        processes.append(subprocess.Popen(command, env={**os.environ, **shared, **own}))
    return wait(processes, seconds)


def wait(processes: list[subprocess.Popen], seconds: float) -> int:
    """Wait for all, at most ``seconds``; the first failure ends the others. 124 where the time is over."""
    end = time.monotonic() + seconds
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = next((code for code in codes if code), None)
            if failed is not None or None not in codes:
                return failed or 0
            if time.monotonic() > end:
                print(f"the ranks did not end within {seconds:.0f} s", file=sys.stderr)
                for process in processes:
                    process.send_signal(signal.SIGUSR1)  # prints where it is
                time.sleep(1.0)
                return 124
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(backend: str, link: str) -> torch.device:
    """Make the default process group; the device of this rank."""
    import torch
    import torch.distributed as dist

    faulthandler.register(signal.SIGUSR1)
    os.environ.update({**NO_MULTICAST, **LINKS[link]})
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if backend == "nccl":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device)
        return device
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group(backend, timeout=TIMEOUT)
    return torch.device("cpu")


def link_name(backend: str, link: str) -> str:
    """What joins the ranks, for a heading."""
    shaped = os.environ.get(SHAPED)
    return shaped or (link if backend == "nccl" else "loopback")


def agreed(ok: bool, device: torch.device) -> bool:
    """Whether all ranks say yes."""
    import torch
    import torch.distributed as dist

    vote = torch.tensor([int(ok)], dtype=torch.int32, device=device)
    dist.all_reduce(vote, dist.ReduceOp.MIN)
    return bool(vote.item())


def largest(number: float, device: torch.device) -> float:
    """The largest of the ranks' numbers."""
    import torch
    import torch.distributed as dist

    value = torch.tensor([number], dtype=torch.float32, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value.item())
