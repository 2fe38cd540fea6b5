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

interpret()

import torch  # noqa: E402

from intscale_compile.communication import norm_kernel, one_shot_kernel, word_kernels  # noqa: E402
from intscale_compile.communication.fused_kernel import (  # noqa: E402
    LARGE_CHUNK,
    MOST_PROGRAMS,
    Schedule,
    fused_all_reduce_kernel,
    gather_slots,
    workspace_bytes,
)
from intscale_compile.communication.fused_norm import norm_quantize  # noqa: E402
from intscale_compile.communication.message import Elements, WireFormat  # noqa: E402
from intscale_compile.communication.reference import simulate_all_reduce, simulate_lossless_all_reduce  # noqa: E402

# ranks, wire, dtype, elements, programs, chunks a round: fewer programs than chunks make several rounds, the last of them not
# full; a last slice that is partial, or empty
CASES = (
    (2, "int8", "float32", 2 * 2 * 4096 + 300, 2, 1),
    (2, "int4", "float32", 2 * 2 * 4096 + 300, 1, 2),
    (3, "int6-spikes", "float32", 5000, 1, 1),
    (3, "int5", "float16", 257, 1, 4),
    (2, "elements", "float16", 2 * 2 * 4096 + 300, 1, 2),
    (3, "elements", "float16", 5000, 2, 1),
)
# elements, programs: ragged, several steps for a program, a program that has nothing in its last step
ONE_SHOT = ((6, 1), (1024 * 3 + 10, 2), (2048, 1), (1024 * 5, 3), (130, 1))
# elements: launches of more programs or fewer than the one before, slices that are ragged or empty, more launches than sides
TWO_SHOT = (6, 1024 * 5 + 10, 40, 2048, 1024 * 7, 2, 4096, 2)
WITH_NORM = ((1, 256, 1), (5, 96, 2), (2, 256, 2))  # rows, features, programs
EPS = 1e-5
CALLS = 2  # one after the other on one workspace


def rank_main(folder: Path, rank: int, ranks: int) -> None:
    """Run the cases of ``ranks`` ranks and save what they gave."""
    torch.save([run(folder / str(i), rank, case) for i, case in enumerate(cases(ranks))], folder / f"result{rank}")


def run(folder: Path, rank: int, case: tuple) -> list:
    """What ``CALLS`` launches of the kernel give."""
    ranks, wire, dtype, elements, programs, per_round = case
    form = form_of(wire)
    length = form.slice_elements(elements, ranks)
    groups = length // form.group_size
    layout = out_layout = form.layout(groups)
    nbytes = workspace_bytes(ranks, layout, out_layout)
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
            x, out, spaces[rank], peers, counts, elements, length, groups, per_round, layout.nbytes, out_layout.nbytes,
            gather_slots(ranks, nbytes), OUT_BITS=out_layout.bits, RANK=rank, RANKS=ranks, PROGRAMS=MOST_PROGRAMS,
            **Schedule(LARGE_CHUNK, per_round, programs).constants(layout),
        )  # fmt: skip
        results.append(out)
    if folder.name == "0":
        results += [*one_shot(folder, rank, ranks), *two_shot(folder, rank, ranks), with_norm(folder, rank, ranks)]
    return results


def with_norm(folder: Path, rank: int, ranks: int) -> list:
    """What calls of the kernel with RMSNorm and quantization give, a program for one row or for several."""
    nbytes = norm_kernel.workspace_bytes(ranks)
    spaces = [
        torch.from_file(str(folder / f"norm{r}"), shared=True, size=nbytes, dtype=torch.uint8) for r in range(ranks)
    ]
    peers = torch.tensor([space.data_ptr() - spaces[rank].data_ptr() for space in spaces])
    counts = torch.zeros(norm_kernel.MOST_PROGRAMS, dtype=torch.int32)
    results = []
    for call, (rows, features, programs) in enumerate(WITH_NORM):
        x, residual, weight = (part[rank] for part in norm_inputs(call, rows, features, ranks))
        added, codes, scale = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8), torch.empty(rows, 1)
        block, _ = norm_kernel.block(features // 2)
        norm_kernel.all_reduce_norm_kernel[(programs,)](
            x, residual, weight, added, codes, scale, spaces[rank], peers, counts, rows, -(-rows // programs), EPS,
            HALF=features // 2, BLOCK=block, WORDS=norm_kernel.MOST_WORDS, RANK=rank, RANKS=ranks,
            PROGRAMS=norm_kernel.MOST_PROGRAMS,
        )  # fmt: skip
        results.append((added, codes, scale))
    return results


def norm_inputs(call: int, rows: int, features: int, ranks: int) -> list:
    """Contributions, residuals and weights of all ranks; the last two are the same on each. A row has an infinity."""
    xs = [x.view(rows, features) for x in inputs(call, rows * features, "float16", ranks)]
    xs[0][rows - 1, 3] = float("inf") if rows > 1 else 1.0
    residual, weight = (x for x in inputs(100 + call, rows * features, "float16", 2))
    return [xs, [residual.view(rows, features)] * ranks, [weight[:features]] * ranks]


def check_norms(results: list, ranks: int) -> None:
    """The sum to the bit; codes that differ by one where a half is rounded, as the mean is summed in another order."""
    for call, (rows, features, _) in enumerate(WITH_NORM):
        xs, residual, weight = norm_inputs(call, rows, features, ranks)
        added, codes, scale = norm_quantize(simulate_lossless_all_reduce(xs), residual[0], weight[0], EPS)
        for rank in range(ranks):
            found = results[rank][call]
            torch.testing.assert_close(found[0], added, rtol=0, atol=0)
            torch.testing.assert_close(found[2], scale, rtol=2e-3, atol=0, equal_nan=True)
            kept = ~scale.isnan().expand_as(codes)
            difference = (found[1].int() - codes.int()).abs()[kept]
            assert difference.max() <= 1 and difference.float().mean() < 0.01, (call, rank)
            torch.testing.assert_close(found[1], results[0][call][1], rtol=0, atol=0)
        assert scale.isnan().sum() == (rows > 1)


def one_shot(folder: Path, rank: int, ranks: int) -> list:
    """What calls of the one-shot kernel give, of sizes that change, one behind the other on one workspace."""
    nbytes = one_shot_kernel.workspace_bytes(ranks)
    spaces = [
        torch.from_file(str(folder / f"one_shot{r}"), shared=True, size=nbytes, dtype=torch.uint8) for r in range(ranks)
    ]
    peers = torch.tensor([space.data_ptr() - spaces[rank].data_ptr() for space in spaces])
    counts = torch.zeros(one_shot_kernel.MOST_PROGRAMS, dtype=torch.int32)
    results = []
    for call, (elements, programs) in enumerate(ONE_SHOT):
        x = inputs(call, elements, "float16", ranks)[rank]
        out, words = torch.empty_like(x), elements // 2
        one_shot_kernel.one_shot_kernel[(programs,)](
            x, out, spaces[rank], peers, counts, words, -(-words // (programs * one_shot_kernel.WORDS)),
            RANK=rank, RANKS=ranks, WORDS=one_shot_kernel.WORDS, PROGRAMS=one_shot_kernel.MOST_PROGRAMS,
        )  # fmt: skip
        results.append(out)
    return results


def two_shot(folder: Path, rank: int, ranks: int) -> list:
    """What calls of the two-shot kernel of words give, of sizes that change, one behind the other on one workspace."""
    nbytes = word_kernels.workspace_bytes(ranks)
    spaces = [
        torch.from_file(str(folder / f"two_shot{r}"), shared=True, size=nbytes, dtype=torch.uint8) for r in range(ranks)
    ]
    peers = torch.tensor([space.data_ptr() - spaces[rank].data_ptr() for space in spaces])
    counts = torch.zeros(word_kernels.MOST_PROGRAMS, dtype=torch.int32)
    results = []
    for call, elements in enumerate(TWO_SHOT):
        x = word_inputs(call, elements, ranks)[rank]
        out = torch.empty_like(x)
        word_kernels.two_shot_kernel[(word_kernels.programs(elements, ranks),)](
            x, out, spaces[rank], peers, counts, elements // 2, word_kernels.slice_words(elements, ranks),
            RANK=rank, RANKS=ranks, WORDS=word_kernels.WORDS, PROGRAMS=word_kernels.MOST_PROGRAMS,
        )  # fmt: skip
        results.append(out)
    return results


def word_inputs(call: int, elements: int, ranks: int) -> list:
    """What every rank puts in; one has the empty word among its elements, one an infinity."""
    xs = inputs(call, elements, "float16", ranks)
    xs[call % ranks].view(torch.int16)[elements // 3 & ~1 :][:2] = -1
    xs[0][-1] = float("inf")
    return xs


def form_of(wire: str):
    """The form of a message."""
    return Elements() if wire == "elements" else WireFormat.parse(wire)


def cases(ranks: int) -> list[tuple]:
    """The cases of so many ranks."""
    return [case for case in CASES if case[0] == ranks]


def inputs(call: int, elements: int, dtype: str, ranks: int):
    """What every rank puts in."""
    generator = torch.Generator().manual_seed(call)
    return [torch.randn(elements, generator=generator).to(getattr(torch, dtype)) for _ in range(ranks)]


def check(ranks: int) -> None:
    """All ranks give the bits of the reference."""
    torch.set_num_threads(1)  # so that a fork has all that there is
    context = multiprocessing.get_context("fork")  # what was imported once serves all ranks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(len(cases(ranks))):
            (folder / str(i)).mkdir()
            for r in range(ranks):
                (folder / str(i) / f"space{r}").write_bytes(bytes(1 << 20))
                (folder / str(i) / f"norm{r}").write_bytes(bytes(norm_kernel.workspace_bytes(ranks)))
                (folder / str(i) / f"two_shot{r}").write_bytes(b"\xff" * word_kernels.workspace_bytes(ranks))
                (folder / str(i) / f"one_shot{r}").write_bytes(bytes(one_shot_kernel.workspace_bytes(ranks)))
        started = [context.Process(target=rank_main, args=(folder, r, ranks)) for r in range(ranks)]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
            process.kill()
        assert [process.exitcode for process in started] == [0] * ranks
        results = [torch.load(folder / f"result{r}") for r in range(ranks)]
    for i, (_, wire, dtype, elements, *_) in enumerate(cases(ranks)):
        for call in range(CALLS):
            given = inputs(call, elements, dtype, ranks)
            lossless = wire == "elements"
            wanted = simulate_lossless_all_reduce(given) if lossless else simulate_all_reduce(given, form_of(wire))
            for rank in range(ranks):
                message = f"{wire} {dtype} {elements}, call {call}, rank {rank}"
                torch.testing.assert_close(results[rank][i][call], wanted, rtol=0, atol=0, msg=message)
    check_norms([result[0][-1] for result in results], ranks)
    for call, (elements, _) in enumerate(ONE_SHOT):
        wanted = simulate_lossless_all_reduce(inputs(call, elements, "float16", ranks))
        for rank in range(ranks):
            found = results[rank][0][CALLS + call]
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=f"one shot {elements}, rank {rank}")
    for call, elements in enumerate(TWO_SHOT):
        wanted = simulate_lossless_all_reduce(word_inputs(call, elements, ranks))
        assert wanted.isnan().any() and (elements == 2 or not wanted.isfinite().all())
        for rank in range(ranks):
            found = results[rank][0][CALLS + len(ONE_SHOT) + call]
            torch.testing.assert_close(
                found, wanted, rtol=0, atol=0, equal_nan=True, msg=f"two shot {elements}, rank {rank}"
            )
            assert torch.equal(found.view(torch.int16), results[0][0][CALLS + len(ONE_SHOT) + call].view(torch.int16))


if __name__ == "__main__":
    sys.exit(run_cases((f"{ranks} ranks", lambda ranks=ranks: check(ranks)) for ranks in (2, 3)))
