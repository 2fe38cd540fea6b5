"""Several ranks on this machine: a script for each, a file as their store, and nothing that can hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SECONDS = 300.0  # two loaded cores; the groups' own timeouts end what hangs


def run_ranks(script: Path, ranks: int, folder: Path, *arguments: str) -> list[Any]:
    """Run ``script rank ranks store result arguments...`` once for each rank; returns what each saved as its result."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    store, results = folder / "store", [folder / f"result{rank}.pt" for rank in range(ranks)]
    processes = []
    for rank in range(ranks):
        command = [sys.executable, str(script), str(rank), str(ranks), str(store), str(results[rank]), *arguments]
        with open(folder / f"log{rank}.txt", "w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    end = time.monotonic() + SECONDS
    try:
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    logs = [(folder / f"log{rank}.txt").read_text()[-3000:] for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(f"rank {i}: {log}" for i, log in enumerate(logs))
    return [torch.load(result, weights_only=False) for result in results]


def main(function: Any) -> None:
    """The body of a script: joins the group, calls ``function(*arguments)`` and saves what it returns."""
    import datetime

    import torch.distributed as dist

    rank, ranks, store, result, *arguments = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks),
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    try:
        torch.save(function(*arguments), result)
        dist.barrier()
    finally:
        dist.destroy_process_group()
