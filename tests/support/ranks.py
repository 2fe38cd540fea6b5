"""Several ranks on this machine: a script for all, a file as their store, and nothing that can hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from tests.support import forks
from tests.support.tracing import quicker_dynamo, same_flags

SECONDS = 300.0  # two loaded cores; the groups' own timeouts end what hangs


def run_ranks(script: Path, ranks: int, folder: Path, *arguments: str, fork: bool = True) -> list[Any]:
    """Run ``script`` as so many ranks; returns what each saved as its result.

    Args:
        script: calls :func:`main`.
        ranks: how many.
        folder: of the store, the results and what each rank prints.
        arguments: of the script's function.
        fork: forks of a process that has imported what they need; not for GPUs, which a forked process may not be able to use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if fork:
        command = ("plain", script, "all", str(ranks), str(folder), *arguments)
        done = forks.run(*command, timeout=SECONDS, **environment)
        (folder / "log_all.txt").write_text(done.stdout + done.stderr)
        codes = [done.returncode]
    else:
        codes = _run_apart(script, ranks, folder, arguments, {**os.environ, **environment})
    logs = {path.stem: path.read_text()[-3000:] for path in sorted(folder.glob("log_*.txt"))}
    assert codes == [0] * len(codes), "\n".join(f"{name}: {text}" for name, text in logs.items())
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run_apart(script: Path, ranks: int, folder: Path, arguments: tuple[str, ...], environment: dict) -> list[int]:
    """Exit codes of ``ranks`` processes that import everything themselves."""
    processes = []
    for number in map(str, range(ranks)):
        command = [sys.executable, str(script), number, str(ranks), str(folder), *arguments]
        with open(folder / f"log_{number}.txt", "w") as log:
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            )
    end = time.monotonic() + SECONDS
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main(function: Callable[..., Any], generated: bool = False) -> None:
    """The body of a script: calls ``function(*arguments)`` as one rank, or in a fork for each.

    Args:
        generated: Inductor writes C++, as for tests with the mark of that name; each rank compiles it.
    """
    quicker_dynamo()
    same_flags()
    torch._inductor.config.cpp.simdlen = 1  # half of g++'s time: see tests/conftest.py
    torch._inductor.config.fallback_by_default = not generated
    number, ranks, name, *arguments = sys.argv[1:]
    folder = Path(name)
    if number != "all":
        _run(function, int(number), int(ranks), folder, arguments)
        return
    children = [_forked(function, rank, int(ranks), folder, arguments) for rank in range(int(ranks))]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(int(any(codes)))


def _forked(function: Callable[..., Any], rank: int, ranks: int, folder: Path, arguments: list[str]) -> int:
    """Process of a rank that runs in a fork of this one, which has no threads yet."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _run(function, rank, ranks, folder, arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return 0


def _run(function: Callable[..., Any], rank: int, ranks: int, folder: Path, arguments: list[str]) -> None:
    """Join the group, call the function and save what it returns."""
    import datetime

    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    try:
        torch.save(function(*arguments), folder / f"result{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
