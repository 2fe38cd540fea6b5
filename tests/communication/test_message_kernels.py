"""The kernels that write and read messages, bit for bit: Triton in its interpreter and compiled, and C++ on this processor."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from intscale_compile.communication import cpu_codec, reference
from intscale_compile.communication.message import WireFormat
from intscale_compile.communication.pieces import Piece
from intscale_compile.reasons import log_once
from tests.communication.inputs import contributions, same_bits
from tests.support import interpreter_works
from tests.support.interpreter import EXTENTS, assert_passed, results_of

SHAPES = ((8192, 2), (5000, 3), (257, 4), (100, 2), (12345, 3))  # elements, ranks
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [name + spikes for name, spikes in itertools.product(("int8", "int6", "int5", "int4"), ("", "-spikes"))]


def run(codec, wire: WireFormat, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Everything that a codec writes in an all-reduce of ``inputs`` and a reduce-scatter, one rank after the other."""
    ranks, elements, dtype = len(inputs), inputs[0].numel(), inputs[0].dtype
    length = wire.slice_elements(elements, ranks)
    piece = Piece(elements, length, 0, length // wire.group_size, wire.group_size)
    layout = out_layout = wire.layout(piece.groups)
    sent = [torch.full((ranks - 1, layout.nbytes), 0xAA, dtype=torch.uint8) for _ in inputs]
    for rank, x in enumerate(inputs):
        codec.encode(x, piece, layout, sent[rank], rank)
    messages, sums = torch.full((ranks, out_layout.nbytes), 0x55, dtype=torch.uint8), []
    for rank, x in enumerate(inputs):
        received = torch.stack([sent[other][rank - (rank > other)] for other in range(ranks) if other != rank])
        codec.reduce(x, received, piece, rank, layout, messages[rank], out_layout)
        sums.append(torch.full((length,), 7.0, dtype=dtype))
        codec.reduce(x, received, piece, rank, layout, sums[-1], None)
    out = torch.full((elements,), 7.0, dtype=dtype)
    codec.decode(messages, piece, out_layout, out)
    return [*sent, messages, *sums, out]


@pytest.mark.parametrize("wire", FORMATS)
def test_compiled_codec_has_the_bits_of_the_reference(wire):
    wire = WireFormat.parse(wire)
    assert cpu_codec.library(wire.spike_reserving) is not None, "no C++ compiler on this machine"
    for (elements, ranks), dtype in itertools.product(SHAPES, DTYPES):
        inputs = contributions(elements, ranks, dtype, special=True)
        for found, expected in zip(run(cpu_codec, wire, inputs), run(reference, wire, inputs)):
            equal = torch.equal(found, expected) if found.dtype == torch.uint8 else same_bits(found, expected)
            assert equal, (elements, ranks, dtype)


def test_without_a_compiler_the_reference_runs_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    cpu_codec.library.cache_clear()
    log_once.cache_clear()
    wire, inputs = WireFormat.parse("int5-spikes"), contributions(1000, 2)
    with caplog.at_level(logging.WARNING, "intscale_compile"):
        found = [run(cpu_codec, wire, inputs) for _ in range(2)][-1]
    cpu_codec.library.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(found, run(reference, wire, inputs)))
    said = [record.getMessage() for record in caplog.records if "C++ compiler" in record.getMessage()]
    assert len(said) == 1 and "CXX" in said[0]


# --- Triton -------------------------------------------------------------------------------------------------------------


@interpreter_works
@pytest.mark.parametrize(
    "prefix",
    [*(f"messages-{name}-" for name in ("int8", "int6", "int5", "int4")), "pieces", "unaligned", "far"],
)
def test_triton_kernels_have_the_bits_of_the_reference(interpreted, prefix):
    assert_passed(interpreted, prefix)


@pytest.fixture(scope="module", params=EXTENTS)
def interpreted(request) -> dict[str, str | None]:
    """Error of every case, or None, by name."""
    pytest.importorskip("triton")
    return results_of("_kernels_interpreter_main", "tests.communication", request.param)


def compiled(name: str, wire: str, target: tuple, element: str = "*bf16", ranks: int = 8, width: str = "i32"):
    """One of the three kernels for a GPU that is not here; ``width``: type of the numbers of elements."""
    from triton.backends.compiler import GPUTarget

    from intscale_compile.communication import triton_kernels
    from tests.support.sass import assemble

    kernel = getattr(triton_kernels, name)
    scalars = dict.fromkeys(("elements", "length", "begin"), width)
    scalars |= dict.fromkeys(("groups", "nbytes", "out_nbytes", "skip"), "i32")
    pointers = dict(
        x_ptr=element, message_ptr="*u8", received_ptr="*u8", out_ptr="*u8" if "reduce" in name else element
    )
    form = WireFormat.parse(wire)
    constants = triton_kernels._constants(form.layout(1)) | dict(RANK=3, RANKS=ranks, OUT_BITS=form.bits)
    options = {option: constants.pop(option) for option in ("num_warps", "enable_fp_fusion")}
    signature = {key: kind for key, kind in (pointers | scalars).items() if key in kernel.arg_names}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    aligned = [key for key in signature if key not in ("groups", "skip")]
    return assemble(kernel, signature, constants, GPUTarget(*target), aligned=aligned, **options)


# Each kernel and each number of bits: the kernel that sums reads and writes codes as the two others do.
QUICK = (("encode_kernel", "int5"), ("reduce_kernel", "int8"), ("reduce_kernel", "int4"), ("decode_kernel", "int6"))
WIDE = [
    pytest.param(name, wire, marks=() if (name, wire) in QUICK else pytest.mark.slow)
    for name in ("encode_kernel", "reduce_kernel", "decode_kernel")
    for wire in ("int8", "int6", "int5", "int4")
]


@pytest.mark.assembles(kernel=lambda name, wire: compiled(name, wire, ("cuda", 90, 32), width="i64"))
@pytest.mark.parametrize("name, wire", WIDE)
def test_hopper_reads_and_writes_wide(name, wire, code):
    """16 bytes of bf16 and 8 bytes of codes at a time, and nothing is spilled or converted between integer and float."""
    bits = WireFormat.parse(wire).bits
    assert code.spill_bytes == 0 and code.count("STL") == code.count("LDL") == 0
    assert code.count("I2F") == code.count("F2I") == code.count("I2FP") == 0
    widths = {base: {i.opcode.split(".")[-1] for i in code.instructions if i.base == base} for base in ("LDG", "STG")}
    if name == "decode_kernel":
        assert "64" in widths["LDG"] and "128" in widths["STG"], widths
    else:
        assert "128" in widths["LDG"] and "64" in widths["STG"], widths
    if name == "decode_kernel" and bits != 5:
        assert code.count("SHFL") == code.count("LDS") == 0, "the planes need no exchange between threads"
    if name == "reduce_kernel":
        loads = [i for i in code.instructions if i.base == "LDG" and i.opcode.endswith(".64")]
        assert len(loads) == 7 * (2 if bits == 8 else 1), "codes of the seven others"


@pytest.mark.parametrize(
    "name", ["encode_kernel", "decode_kernel", pytest.param("reduce_kernel", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "wire",
    ["int6-spikes", *(pytest.param(w, marks=pytest.mark.slow) for w in ("int4-spikes", "int5-spikes"))],
)
def test_other_gpus(name, wire):
    pytest.importorskip("triton")
    from tests.support.sass import disassemble

    for arch in (80, 100):
        assert disassemble(compiled(name, wire, ("cuda", arch, 32), "*fp16", ranks=4)).spill_bytes <= 16
    assert len(compiled(name, wire, ("hip", "gfx942", 64), "*fp32", ranks=4).asm["hsaco"]) > 0
