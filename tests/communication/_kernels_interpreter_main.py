"""Run the kernels of the quantized collectives in Triton's interpreter; prints one line of JSON for each case.

A process of its own, because ``TRITON_INTERPRET`` is read when triton is imported.
"""

from __future__ import annotations

import itertools
import sys

from tests.support.interpreter import interpret, run_cases

interpret()

import torch  # noqa: E402

from intscale_compile.communication import cpu_codec, reference, triton_kernels  # noqa: E402
from intscale_compile.communication.message import WireFormat  # noqa: E402
from intscale_compile.communication.pieces import Piece, pieces  # noqa: E402
from tests.communication.inputs import contributions, same_bits  # noqa: E402

WIRES = tuple(name + spikes for name, spikes in itertools.product(("int8", "int6", "int5", "int4"), ("", "-spikes")))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# See tests/support/interpreter.py.
QUICK = "messages-.*-5000-|messages-(int8|int5-spikes|int4|int4-spikes)-[^s]|pieces-int5|unaligned|far"


def truncated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 as the interpreter converts it: it truncates to bf16 where hardware rounds to nearest."""
    if dtype is not torch.bfloat16:
        return values.to(dtype)
    return (values.view(torch.int32) & -65536).view(torch.float32).to(dtype)


def check_messages(wire: WireFormat, elements: int, ranks: int, dtype: torch.dtype, begin: int = 0) -> None:
    """The three kernels on one piece, against the reference: messages byte by byte, elements bit by bit."""
    inputs = contributions(elements, ranks, dtype, special=True)
    length = wire.slice_elements(elements, ranks)
    piece = Piece(elements, length, begin, (length - begin) // wire.group_size, wire.group_size)
    layout = out_layout = wire.layout(piece.groups)
    sent = []
    for rank, x in enumerate(inputs):
        found, expected = (torch.full((ranks - 1, layout.nbytes), 0xAA, dtype=torch.uint8) for _ in range(2))
        triton_kernels.encode(x, piece, layout, found, rank)
        reference.encode(x, piece, layout, expected, rank)
        assert torch.equal(found, expected), f"encode on rank {rank}: {(found != expected).nonzero()[:5].tolist()}"
        sent.append(found)
    messages = torch.empty((ranks, out_layout.nbytes), dtype=torch.uint8)
    for rank, x in enumerate(inputs):
        received = torch.stack([sent[other][rank - (rank > other)] for other in range(ranks) if other != rank])
        expected = torch.full((out_layout.nbytes,), 0xAA, dtype=torch.uint8)
        reference.reduce(x, received, piece, rank, layout, expected, out_layout)
        messages[rank] = 0x55
        triton_kernels.reduce(x, received, piece, rank, layout, messages[rank], out_layout)
        assert torch.equal(messages[rank], expected), f"reduce on rank {rank}"
        sums, wide = torch.full((length,), 7.0, dtype=dtype), torch.full((length,), 7.0)
        triton_kernels.reduce(x, received, piece, rank, layout, sums, None)
        reference.reduce(x, received, piece, rank, layout, wide, None)
        assert same_bits(sums, truncated(wide, dtype)), f"sum on rank {rank}"
    found, wide = torch.full((elements,), 7.0, dtype=dtype), torch.full((elements,), 7.0)
    triton_kernels.decode(messages, piece, out_layout, found)
    reference.decode(messages, piece, out_layout, wide)
    assert same_bits(found, truncated(wide, dtype)), "decode"


def check_pieces(wire: WireFormat) -> None:
    """The same bits in pieces of three groups."""
    elements, ranks = 2500, 3
    length = wire.slice_elements(elements, ranks)
    for piece in pieces(elements, length, wire.group_size, 3):
        check_messages(wire, elements, ranks, torch.bfloat16, piece.begin)


def check_unaligned() -> None:
    """Slices of a reduce-scatter that are not whole groups begin anywhere."""
    wire = WireFormat.parse("int5-spikes")
    for x in (contributions(3 * 77, 1, dtype, special=True)[0] for dtype in DTYPES):
        piece = Piece(x.numel(), 77, 0, 1, 128)
        layout = wire.layout(1)
        found, expected = (torch.full((3, layout.nbytes), 0xAA, dtype=torch.uint8) for _ in range(2))
        triton_kernels.encode(x, piece, layout, found, 3)
        reference.encode(x, piece, layout, expected, 3)
        assert torch.equal(found, expected)
        back, wide = torch.full((231,), 7.0, dtype=x.dtype), torch.full((231,), 7.0)
        triton_kernels.decode(found, piece, layout, back)
        reference.decode(found, piece, layout, wide)
        assert same_bits(back, truncated(wide, x.dtype))


def check_far() -> None:
    """Elements behind the first 2**31, of a tensor of which only the pages that are touched exist."""
    wire, begin = WireFormat.parse("int8"), (1 << 31) - 1024
    elements = begin + 3000
    x, back = torch.empty(elements, dtype=torch.float16), torch.empty(elements, dtype=torch.float16)
    x[begin:] = contributions(3000, 1, torch.float16)[0]
    piece = Piece(elements, elements, begin, 24, 128)
    layout = wire.layout(24)
    found, expected = (torch.full((1, layout.nbytes), 0xAA, dtype=torch.uint8) for _ in range(2))
    for codec in (triton_kernels, cpu_codec):
        codec.encode(x, piece, layout, found, 1)
        reference.encode_message(x[begin:], layout, expected[0])
        assert torch.equal(found, expected), codec
        back[begin:] = 7.0
        codec.decode(found, piece, layout, back)
        assert same_bits(back[begin:], reference.decode_message(found[0], layout)[:3000].to(torch.float16)), codec


def main() -> int:
    cases = []
    for number, wire in enumerate(WIRES):
        dtype, others = (
            DTYPES[number % 3],
            ((100, 2, torch.float32), (257, 4, torch.bfloat16), (8192, 2, torch.float16)),
        )
        for arguments in ((5000, 3, dtype), others[number % 3]):
            name = f"messages-{wire}-{'-'.join(map(str, arguments))}"
            cases.append((name, lambda w=wire, a=arguments: check_messages(WireFormat.parse(w), *a)))
    for wire in ("int4", "int5-spikes"):
        cases.append((f"pieces-{wire}", lambda w=wire: check_pieces(WireFormat.parse(w))))
    return run_cases([*cases, ("unaligned", check_unaligned), ("far", check_far)], QUICK)


if __name__ == "__main__":
    sys.exit(main())
