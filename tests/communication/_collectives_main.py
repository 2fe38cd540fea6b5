"""One rank of ``test_collectives``: results on normal data, odd sizes, NaN, options that disagree, many in a row.

Numbers and checksums go back to the parent, which compares ranks; what a rank can see alone is asserted here.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from intscale_compile.communication import all_gather, all_reduce, all_to_all, cpu_codec, ops, reduce_scatter, transport  # noqa: E402
from intscale_compile.communication.exchange import simulate_all_to_all  # noqa: E402
from intscale_compile.communication.message import WireFormat  # noqa: E402
from intscale_compile.communication.reference import (  # noqa: E402
    simulate_all_gather,
    simulate_all_reduce,
    simulate_reduce_scatter,
)
from intscale_compile.errors import CommunicationError, ConfigError, InputError, UnsupportedOpError  # noqa: E402
from tests.communication.inputs import contributions, same_bits  # noqa: E402
from tests.support.ranks import main  # noqa: E402

WIRES = ("int8", "int6", "int6-spikes", "int5", "int4", "int4-spikes")
ODD = (128, 129, 1000, 4097, 20001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Records(logging.Handler):
    """Messages of the package's log."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []
        logging.getLogger("intscale_compile").addHandler(self)
        logging.getLogger("intscale_compile").setLevel(logging.DEBUG)

    def emit(self, record):
        self.texts.append(record.getMessage())


def check_errors_and_bits(rank: int, ranks: int) -> dict[str, float]:
    """Relative errors against fp64 by wire format; every result has the bits of the simulation in one process."""
    inputs = contributions(1 << 15, ranks)
    exact = sum(x.double() for x in inputs)
    errors = {}
    for wire in WIRES:
        found = all_reduce(inputs[rank], wire)
        assert same_bits(found, simulate_all_reduce(inputs, WireFormat.parse(wire))), wire
        assert torch.equal(found, all_reduce(inputs[rank], wire)), "not deterministic"
        errors[wire] = float((found - exact).norm() / exact.norm())
    return errors


def check_odd_sizes(rank: int, ranks: int) -> None:
    for elements, dtype in ((e, d) for e in ODD for d in DTYPES):
        inputs = contributions(elements, ranks, dtype, special=True)
        for wire in ("int8", "int5-spikes"):
            expected = simulate_all_reduce(inputs, WireFormat.parse(wire))
            assert same_bits(all_reduce(inputs[rank], wire), expected), (elements, dtype, wire)
    x = contributions(6000, ranks, torch.bfloat16)[rank].view(30, 200)
    assert torch.equal(all_reduce(x.t(), "int8"), all_reduce(x.t().contiguous(), "int8")), "strides"
    assert all_reduce(x.t(), "int8").is_contiguous() and all_reduce(x.view(3, 10, 200), "int8").shape == (3, 10, 200)
    assert torch.equal(all_reduce(x[::2], "int4"), all_reduce(x[::2].clone(), "int4"))
    assert all_reduce(x[:0], "int4").shape == (0, 200)


def check_pieces(rank: int, ranks: int) -> None:
    """The number of pieces changes no bit, of none of the three collectives."""
    x = contributions(3000 * ranks, ranks, torch.bfloat16)[rank]
    before = [collective(x, "int6") for collective in (all_reduce, reduce_scatter, all_gather)]
    kept = transport.PIECE_BYTES["cpu"]
    for nbytes in (1, 2000):
        transport.PIECE_BYTES["cpu"] = nbytes
        for collective, expected in zip((all_reduce, reduce_scatter, all_gather), before):
            assert torch.equal(collective(x, "int6"), expected), (collective, nbytes)
    transport.PIECE_BYTES["cpu"] = kept


def check_all_to_all(rank: int, ranks: int) -> None:
    """Dispatch and combine of expert parallelism: uneven splits, empty ones, odd widths, with the bits of the codec."""
    for width, dtype, wire in (
        (256, torch.bfloat16, "int8"),
        (200, torch.float32, "int4-spikes"),
        (1, torch.float16, "int6"),
    ):
        splits = [[(3 * i + 2 * j + width) % 5 for j in range(ranks)] for i in range(ranks)]
        inputs = [contributions(sum(rows) * width, 1, dtype)[0].view(-1, width) + i for i, rows in enumerate(splits)]
        coming = [rows[rank] for rows in splits]
        found = all_to_all(inputs[rank], wire, coming, splits[rank])
        assert same_bits(found, simulate_all_to_all(inputs, WireFormat.parse(wire), splits, rank)), (width, wire)
        back = all_to_all(found, wire, splits[rank], coming)
        assert back.shape == inputs[rank].shape
        error = (back.double() - inputs[rank].double()).norm() / inputs[rank].double().norm()
        assert error < (0.2 if "4" in wire else 0.05), (wire, error)
    even = torch.arange(2 * ranks, dtype=torch.float32).view(-1, 1) + 100 * rank
    assert all_to_all(even, "int8").shape == even.shape
    raises(InputError, "add up to the rows", all_to_all, even, "int8", [1] * ranks, [1] * ranks)
    raises(InputError, "for each rank", all_to_all, even, "int8", [2] * ranks, [2 * ranks])


def check_parts(rank: int, ranks: int) -> dict[str, float]:
    """reduce_scatter and all_gather: bits of the simulation, and errors."""
    errors = {}
    for wire in ("int8", "int4"):
        parsed = WireFormat.parse(wire)
        for rows, dtype in ((5, torch.bfloat16), (128, torch.float32)):
            inputs = [x.view(ranks * rows, 77) for x in contributions(ranks * rows * 77, ranks, dtype)]
            expected = simulate_reduce_scatter([x.flatten() for x in inputs], parsed, rows * 77, dtype)[rank]
            found = reduce_scatter(inputs[rank], wire)
            assert found.shape == (rows, 77) and same_bits(found.flatten(), expected), (wire, rows)
            exact = sum(x.double() for x in inputs)[rank * rows : (rank + 1) * rows]
            errors[f"reduce_scatter {wire} {rows}"] = float((found - exact).norm() / exact.norm())
            flat = [x.flatten() for x in inputs]
            wanted = simulate_all_gather(flat, parsed, flat[0].numel(), ranks * flat[0].numel(), dtype)
            gathered = all_gather(inputs[rank], wire)
            assert gathered.shape == (ranks * ranks * rows, 77) and same_bits(gathered.flatten(), wanted)
            exact = torch.cat(inputs).double()
            errors[f"all_gather {wire} {rows}"] = float((gathered - exact).norm() / exact.norm())
    return errors


def check_not_finite(rank: int, ranks: int) -> None:
    """NaN or Inf of one rank is seen on all, within its group alone."""
    for value in (float("nan"), float("inf"), float("-inf")):
        for at in (3, 5000, 9999):
            x = contributions(10000, ranks, torch.bfloat16)[rank]
            clean = all_reduce(x, "int4-spikes")
            if rank == ranks - 1:
                x[at] = value
            found = all_reduce(x, "int4-spikes")
            group = torch.arange(10000) // 128 == at // 128
            assert not found[group].isfinite().any() and torch.equal(found[~group], clean[~group]), (value, at)


def check_many(rank: int, ranks: int) -> float:
    """40 collectives of random sizes and formats, all against fp64, and some against the simulation; returns a checksum."""
    random.seed(17)
    total = 0.0
    for number in range(40):
        elements, wire = int(2 ** random.uniform(7, 16)), random.choice(WIRES)
        inputs = contributions(elements, ranks, random.choice(DTYPES))
        found = all_reduce(inputs[rank], wire)
        exact = sum(x.double() for x in inputs)
        assert (found - exact).norm() <= 0.2 * exact.norm(), (elements, wire)
        if number % 10 == rank:
            assert same_bits(found, simulate_all_reduce(inputs, WireFormat.parse(wire))), (elements, wire)
        total += found.double().sum().item()
    return total


def raises(error: type[Exception], text: str, function, *arguments) -> None:
    try:
        function(*arguments)
    except error as raised:
        assert text in str(raised), str(raised)
        return
    raise AssertionError(f"no {error.__name__} that says {text!r}")


def check_bad_input(rank: int, ranks: int, log: Records) -> None:
    x = torch.randn(1024)
    raises(InputError, "plain collective", all_reduce, torch.arange(1024), "int8")
    raises(InputError, "plain collective", all_gather, x.double(), "int8")
    raises(InputError, "multiple of", reduce_scatter, torch.randn(ranks * 8 + 1, 64), "int8")
    raises(ConfigError, "no wire format", all_reduce, x, "int3")
    raises(CommunicationError, "no process group named 'nobody'", all_reduce, x, "int8", "nobody")
    raises(CommunicationError, "compile again", ops.ALL_GATHER_OP, x, "int8", ranks + 1, dist.group.WORLD.group_name)
    raises(UnsupportedOpError, "no gradient", all_reduce(x.clone().requires_grad_(), "int8").sum().backward)
    temporary = dist.new_group(list(range(ranks)), backend="gloo")
    name = temporary.group_name
    assert torch.equal(all_reduce(x, "int8", name), all_reduce(x, "int8", temporary))
    dist.destroy_process_group(temporary)
    raises(CommunicationError, "was destroyed", all_reduce, x, "int8", name)
    # Smaller than one group: the plain sum, said once.
    log.texts.clear()
    small = torch.full((127,), 0.5 + rank)
    for _ in range(2):
        assert torch.equal(all_reduce(small, "int4"), sum(torch.full((127,), 0.5 + r) for r in range(ranks)))
    assert reduce_scatter(small[: 2 * ranks], "int4").shape == (2,) and all_gather(small, "int4").shape == (
        127 * ranks,
    )
    assert sum("quantized all_reduce (int4): a message of 127" in text for text in log.texts) == 1, log.texts


def check_disagreement(rank: int, ranks: int) -> None:
    """Ranks whose options differ learn what each of them does, and the group works on."""
    x = torch.randn(2000 + 16 * (rank == 0))
    raises(CommunicationError, "disagree", all_reduce, x, "int8")
    raises(
        CommunicationError, f"rank {ranks - 1}: all_reduce of 1024", all_reduce, x[:1024], "int5" if rank else "int4"
    )
    raises(CommunicationError, "disagree", all_reduce, x[:1024].to(torch.bfloat16 if rank else torch.float16), "int8")
    raises(CommunicationError, "disagree", all_reduce if rank else all_gather, x[:1280], "int8")
    assert torch.equal(all_reduce(x[:1024] * 0 + 1, "int8"), torch.full((1024,), float(ranks)))


def check_absent(rank: int, ranks: int) -> None:
    """A rank that does not come: the others stop after the timeout of the group, and say who is missing."""
    impatient = dist.new_group(list(range(ranks)), backend="gloo", timeout=timedelta(seconds=2))
    if rank:
        start = time.monotonic()
        raises(CommunicationError, "ranks [0] of group", all_reduce, torch.randn(640), "int8", impatient)
        assert time.monotonic() - start < 20
    dist.barrier()


def check_groups(rank: int, ranks: int) -> None:
    """Groups smaller than the world: ranks count within them; a group of one rank gives a copy; outsiders get an error."""
    pair = dist.new_group([ranks - 2, ranks - 1], backend="gloo")
    alone = [dist.new_group([r], backend="gloo") for r in range(ranks)][rank]
    x = contributions(3000, ranks)[rank]
    copy = all_reduce(x, "int4", alone)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
    assert torch.equal(reduce_scatter(x, "int4", alone), x) and torch.equal(all_gather(x, "int4", alone), x)
    if rank >= ranks - 2:
        expected = simulate_all_reduce(contributions(3000, ranks)[-2:], WireFormat.parse("int8"))
        assert same_bits(all_reduce(x, "int8", pair), expected)
    else:
        raises(CommunicationError, "members of the group only", all_reduce, x, "int8", pair)
    dist.barrier()


def check_compiled(rank: int, ranks: int) -> None:
    """opcheck, and the three ops in one graph with a size that is not known."""
    name = dist.group.WORLD.group_name
    x = contributions(1024 * ranks, ranks)[rank].view(ranks * 8, 128)
    torch.library.opcheck(ops.ALL_REDUCE_OP, (x, "int8", name))
    torch.library.opcheck(ops.REDUCE_SCATTER_OP, (x, "int8", ranks, name))
    torch.library.opcheck(ops.ALL_GATHER_OP, (x, "int8", ranks, name))

    def step(x):
        part = ops.REDUCE_SCATTER_OP(x * 2, "int8", ranks, name)
        return ops.ALL_REDUCE_OP(ops.ALL_GATHER_OP(part, "int5", ranks, name) + 1, "int6", name)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), step(x)) and torch.equal(compiled(x[: 4 * ranks]), step(x[: 4 * ranks]))


def collectives() -> dict:
    """All checks; what the parent compares."""
    torch.set_num_threads(1)
    rank, ranks, log = dist.get_rank(), dist.get_world_size(), Records()
    result = {"errors": check_errors_and_bits(rank, ranks), "parts": check_parts(rank, ranks)}
    check_odd_sizes(rank, ranks)
    check_pieces(rank, ranks)
    check_all_to_all(rank, ranks)
    check_not_finite(rank, ranks)
    check_bad_input(rank, ranks, log)
    check_disagreement(rank, ranks)
    check_absent(rank, ranks)
    check_groups(rank, ranks)
    if ranks == 2:
        check_compiled(rank, ranks)
    x = contributions(70001, ranks, torch.bfloat16, special=True)[rank]
    result["result"] = {wire: all_reduce(x, wire).view(torch.int16) for wire in WIRES}
    result["many"] = check_many(rank, ranks)
    result["logged"] = [text for text in log.texts if "C++ compiler" in text]
    return result


if __name__ == "__main__":
    for spikes in (False, True):  # compiled once, not by every rank
        cpu_codec.library(spikes)
    main(collectives)
