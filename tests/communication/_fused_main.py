"""The fused all-reduce in Triton's interpreter: one process per rank, the workspaces in memory that they share.

    python -m tests.communication._fused_main

Prints one line of JSON per case: the first byte that differs between the ranks, or from ``reference.py``, as its error.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from pathlib import Path

from tests.support.interpreter import interpret, run_cases

# ranks, wire, dtype, elements, programs: fewer programs than chunks make several rounds; a last slice that is partial, or empty
CASES = (
    (2, "int8", "float32", 2 * 3 * 2048 + 300, 2),
    (3, "int6-g32-spikes", "float32", 5000, 1),
    (3, "int5", "float16", 257, 1),
)
CALLS = 2  # one after the other on one workspace


def rank_main(folder: Path, rank: int, case: tuple) -> None:
    """Run the kernel ``CALLS`` times and save what it gave."""
    interpret()
    import torch

    from intscale_compile.communication.fused_kernel import MOST_PROGRAMS, fused_all_reduce_kernel
    from intscale_compile.communication.message import WireFormat
    from intscale_compile.communication.triton_kernels import _constants

    torch.set_num_threads(1)
    ranks, wire, dtype, elements, programs = case
    form = WireFormat.parse(wire)
    length = form.slice_elements(elements, ranks)
    groups = length // form.group_size
    layout, out_layout = form.reduce_layout(groups), form.gather_layout(groups)
    nbytes = 8 * ranks * MOST_PROGRAMS + ranks * (layout.nbytes + out_layout.nbytes)
    spaces = [
        torch.from_file(str(folder / f"space{r}"), shared=True, size=nbytes, dtype=torch.uint8) for r in range(ranks)
    ]
    peers = torch.tensor([space.data_ptr() - spaces[rank].data_ptr() for space in spaces])
    counts = torch.zeros(MOST_PROGRAMS, dtype=torch.int32)
    results = []
    for call in range(CALLS):
        x = inputs(call, elements, dtype, ranks)[rank]
        out = torch.empty_like(x)
        fused_all_reduce_kernel[(programs,)](
            x, out, spaces[rank], peers, counts, elements, length, groups, layout.nbytes, out_layout.nbytes,
            OUT_BITS=out_layout.bits, RANK=rank, RANKS=ranks, PROGRAMS=MOST_PROGRAMS, **_constants(layout),
        )  # fmt: skip
        results.append(out)
    torch.save(results, folder / f"result{rank}")


def inputs(call: int, elements: int, dtype: str, ranks: int):
    """What every rank puts in."""
    import torch

    generator = torch.Generator().manual_seed(call)
    return [torch.randn(elements, generator=generator).to(getattr(torch, dtype)) for _ in range(ranks)]


def check(case: tuple) -> None:
    """All ranks give the bits of the reference."""
    import torch

    from intscale_compile.communication.message import WireFormat
    from intscale_compile.communication.reference import simulate_all_reduce

    ranks, wire, dtype, elements, _ = case
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for r in range(ranks):
            (folder / f"space{r}").write_bytes(bytes(1 << 20))
        started = [context.Process(target=rank_main, args=(folder, r, case)) for r in range(ranks)]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            process.kill()
        assert [process.exitcode for process in started] == [0] * ranks
        results = [torch.load(folder / f"result{r}") for r in range(ranks)]
    for call in range(CALLS):
        wanted = simulate_all_reduce(inputs(call, elements, dtype, ranks), WireFormat.parse(wire))
        for rank in range(ranks):
            torch.testing.assert_close(results[rank][call], wanted, rtol=0, atol=0)


if __name__ == "__main__":
    sys.exit(run_cases((f"{c[0]}-{c[1]}-{c[2]}-{c[3]}", lambda c=c: check(c)) for c in CASES))
