"""The fused all-reduce in Triton's interpreter: one process per rank, the workspaces in memory that they share.

    python -m tests.communication._fused_main

Prints one line of JSON per case: the first byte that differs between the ranks, or from ``reference.py``, as its error.
"""

from __future__ import annotations

import collections
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

from tests.support.interpreter import interpret, prepare, run_cases

interpret()

import torch  # noqa: E402

from intscale_compile.communication import code_words, fused_kernel, triton_kernels, word_kernels  # noqa: E402
from intscale_compile.communication.fused_kernel import (  # noqa: E402
    LARGE_CHUNK,
    MOST_PROGRAMS,
    Schedule,
    fused_all_reduce_kernel,
    gather_slots,
    workspace_bytes,
)
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
# kernels of words and elements: launches of more programs or fewer than the one before, slices that are ragged or empty, more
# launches than sides
FORMS = {"one_shot": lambda _: word_kernels.ONE_SHOT, "two_shot": word_kernels.two_shot}
SIZES = (6, 1024 * 5 + 10, 40, 4096, 2)
if "--all" in sys.argv:
    SIZES = (6, 1024 * 5 + 10, 40, 2048, 1024 * 7, 2, 4096, 2)
IN_WORDS = [(name, elements) for elements in SIZES for name in FORMS]
# 8-bit codes in words: a last slice that is partial, or empty; a launch that begins within the slices; more launches than sides
IN_CODES = ((300, "float32"), (3 * 2 * 2048 + 200, "float16"), (130, "float16"), (5000, "float32"))
if "--all" in sys.argv:
    IN_CODES = (*IN_CODES[:3], (9000, "float16"), (2 * 5 * 2048 + 200, "float16"), IN_CODES[3])
CODE_PROGRAMS = 2
CALLS = 2  # one after the other on one workspace


def wait_politely() -> None:
    """A kernel that asks for the same words again, which its peer has not written yet, sleeps before it does.

    Otherwise ranks that wait take the processors from those that they wait for.
    """
    from triton.runtime.interpreter import InterpreterBuilder  # after TRITON_INTERPRET

    load, asked = InterpreterBuilder.create_masked_load, collections.deque(maxlen=8)

    def create_masked_load(self, ptrs, *rest):
        if rest[-1]:  # volatile
            first = int(ptrs.data.flat[0])
            if first in asked:
                time.sleep(0.002)
            asked.append(first)
        return load(self, ptrs, *rest)

    InterpreterBuilder.create_masked_load = create_masked_load


def rank_main(folder: Path, rank: int, ranks: int) -> None:
    """Run the cases of ``ranks`` ranks and save what they gave."""
    wait_politely()
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
        results += in_words(folder, rank, ranks) + in_codes(folder, rank, ranks)
    return results


def in_codes(folder: Path, rank: int, ranks: int) -> list:
    """What calls of the kernel of 8-bit codes give."""
    form = code_words.CodeForm(ranks, CODE_PROGRAMS)
    counts = torch.zeros(CODE_PROGRAMS, dtype=torch.int32)
    spaces = [
        torch.from_file(str(folder / f"codes{r}"), shared=True, size=form.workspace_bytes, dtype=torch.uint8)
        for r in range(ranks)
    ]
    peers = torch.tensor([space.data_ptr() - spaces[rank].data_ptr() for space in spaces])
    results = []
    for call, (elements, dtype) in enumerate(IN_CODES):
        x = code_inputs(call, elements, dtype, ranks)[rank]
        length = WireFormat(8).slice_elements(elements, ranks)
        groups, out = length // 128, torch.empty_like(x)
        for begin in range(0, groups, form.groups):
            code_words.code_words_kernel[(form.launched(groups - begin),)](
                x, out, spaces[rank], peers, counts, elements, length, groups, begin, form.programs,
                RANK=rank, RANKS=ranks, GROUPS=code_words.GROUPS,
            )  # fmt: skip
        results.append(out)
    return results


def code_inputs(call: int, elements: int, dtype: str, ranks: int) -> list:
    """What every rank puts in: groups of one value, of its largest code four times in a word, with NaN and with infinities."""
    xs = inputs(call, elements, dtype, ranks)
    for rank, x in enumerate(xs):
        x[elements // 2 :][:8] = 9.0
        x[: 64 * (rank + call % 2)] = -3.25
    xs[call % ranks][-1] = float("inf")
    if elements > 5000:
        xs[0][1500] = float("nan")
        xs[1][4000] = -float("inf")
    return xs


def in_words(folder: Path, rank: int, ranks: int) -> list:
    """What calls of the kernels of words give, of sizes that change, one behind the other on one workspace for each kernel."""
    forms = {name: form(ranks) for name, form in FORMS.items()}
    counts = {name: torch.zeros(form.programs, dtype=torch.int32) for name, form in forms.items()}
    results = []
    for call, (name, elements) in enumerate(IN_WORDS):
        form = forms[name]
        nbytes = form.workspace_bytes(ranks)
        spaces = [
            torch.from_file(str(folder / f"{name}{r}"), shared=True, size=nbytes, dtype=torch.uint8)
            for r in range(ranks)
        ]
        peers = torch.tensor([space.data_ptr() - spaces[rank].data_ptr() for space in spaces])
        x = word_inputs(call, elements, ranks)[rank]
        out, lengths = torch.empty_like(x), [] if name == "one_shot" else [form.slice_words(elements)]
        getattr(word_kernels, f"{name}_kernel")[(form.launched(elements),)](
            x, out, spaces[rank], peers, counts[name], elements // 2, *lengths, LEGS=form.legs,
            RANK=rank, RANKS=ranks, WORDS=word_kernels.WORDS, PROGRAMS=form.programs,
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
    prepare(fused_kernel, triton_kernels, word_kernels, code_words)
    context = multiprocessing.get_context("fork")  # what was imported once serves all ranks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(len(cases(ranks))):
            (folder / str(i)).mkdir()
            for r in range(ranks):
                (folder / str(i) / f"space{r}").write_bytes(bytes(1 << 20))
                for kernel, form in FORMS.items() if i == 0 else ():
                    (folder / "0" / f"{kernel}{r}").write_bytes(b"\xff" * form(ranks).workspace_bytes(ranks))
                if i == 0:
                    nbytes = code_words.CodeForm(ranks, CODE_PROGRAMS).workspace_bytes
                    (folder / "0" / f"codes{r}").write_bytes(b"\xff" * nbytes)
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
    for call, (name, elements) in enumerate(IN_WORDS):
        wanted = simulate_lossless_all_reduce(word_inputs(call, elements, ranks))
        assert wanted.isnan().any() and (elements == 2 or not wanted.isfinite().all())
        for rank in range(ranks):
            found, first = results[rank][0][CALLS + call], results[0][0][CALLS + call]
            message = f"{name} {elements}, rank {rank}"
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=message)
            assert torch.equal(found.view(torch.int16), first.view(torch.int16)), message
    for call, (elements, dtype) in enumerate(IN_CODES):
        wanted = simulate_all_reduce(code_inputs(call, elements, dtype, ranks), WireFormat(8))
        assert wanted.isnan().any() and wanted.isfinite().any()
        for rank in range(ranks):
            found = results[rank][0][CALLS + len(IN_WORDS) + call]
            message = f"codes {elements} {dtype}, rank {rank}"
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=message)


if __name__ == "__main__":
    sys.exit(run_cases((f"{ranks} ranks", lambda ranks=ranks: check(ranks)) for ranks in (2, 3)))
