"""The inline assembly of the kernels, executed word by word: every packed byte, every scale, every position.

The interpreter runs the plain twin of these instructions; this is what stands for the assembly itself without a GPU.
"""

from __future__ import annotations

import ast
import inspect
import textwrap

import numpy as np
import pytest

pytest.importorskip("triton")
from intscale_compile.kernels import triton_tile

MASK = 0xFFFFFFFF


def lookup3(a, b, c, table: int):
    """``lop3``: bit ``4a + 2b + c`` of ``table`` for every bit position."""
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            pick = [value if index >> shift & 1 else ~value & MASK for value, shift in ((a, 2), (b, 1), (c, 0))]
            result |= pick[0] & pick[1] & pick[2]
    return result


OPERATIONS = {
    "shl.b32": lambda a, b: a << b & MASK,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "bfe.u32": lambda a, first, width: a >> first & (1 << width) - 1,
    "xor.b32": lambda a, b: a ^ b,
    "sub.u32": lambda a, b: a - b & MASK,
    "mad.lo.u32": lambda a, b, c: a * b + c & MASK,
    "lop3.b32": lambda a, b, c, table: lookup3(a, b, c, int(table[0])),
}


def assembly(function) -> list[str]:
    """Text of the inline assembly in a device function, in order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "attr", "") == "inline_asm_elementwise"]
    return [call.args[0].value for call in sorted(calls, key=lambda call: call.lineno)]


def execute(text: str, registers: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Run the instructions on 32-bit words (held in int64); returns ``$0`` and ``$1`` as int8 ``[words, 4]``."""
    size = next(iter(registers.values())).shape
    for statement in filter(None, (line.strip(" {}\n") for line in text.split(";"))):
        if statement.startswith(".reg"):
            continue
        opcode, rest = statement.split(None, 1)
        target, *sources = [name.strip() for name in rest.split(",")]
        values = [registers[s] if s in registers else np.full(size, int(s, 0), np.int64) for s in sources]
        registers[target] = OPERATIONS[opcode](*values)
    halves = (registers[name].astype(np.uint32).view(np.int8).reshape(-1, 4) for name in ("$0", "$1"))
    return tuple(halves)


def packed_words() -> np.ndarray:
    """Words in which every byte value meets every other in a neighbouring position."""
    first, second = np.meshgrid(np.arange(256), np.arange(256))
    bytes_ = np.stack([first, second, first ^ 0xFF, second ^ 0x55], -1).reshape(-1, 4)
    return bytes_.astype(np.uint8).view(np.uint32).reshape(-1).astype(np.int64)


def codes_of(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unsigned = words.astype(np.uint32).view(np.uint8).reshape(-1, 4).astype(int)
    return (unsigned & 15) - 8, (unsigned >> 4) - 8


@pytest.mark.parametrize("index, factor", [(0, 16), (1, 1)], ids=["times16", "sign_extended"])
def test_unpack(index, factor):
    words = packed_words()
    low, high = execute(assembly(triton_tile.unpack_codes)[index], {"$2": words})
    expected = codes_of(words)
    assert np.array_equal(low, expected[0] * factor) and np.array_equal(high, expected[1] * factor)


@pytest.mark.parametrize("scale", range(1, 16))
def test_fold(scale):
    two_scales, one_scale = assembly(triton_tile.fold_codes)
    words = packed_words()
    expected = codes_of(words)
    # Each operand takes four registers for a pack of four elements; those of a pack lie in one row and are equal.
    low, high = execute(one_scale, {"$2": words, "$3": np.full_like(words, scale)})
    assert np.array_equal(low, expected[0] * scale) and np.array_equal(high, expected[1] * scale)
    low, high = execute(two_scales, {"$2": words, "$3": np.full_like(words, scale | (16 - scale) << 16)})
    assert np.array_equal(low, expected[0] * scale) and np.array_equal(high, expected[1] * (16 - scale))


@pytest.mark.parametrize("scale", range(1, 8))
def test_center(scale):
    """Every zero point, another scale and another zero point in the high half."""
    (text,) = assembly(triton_tile.center_codes)
    words = packed_words()
    low_codes, high_codes = codes_of(words)
    for zero in range(-8, 8):
        scales, zeros = (scale, 8 - scale), (zero, -1 - zero)
        factors = sum((s | s * (z + 8) << 8) << 16 * half for half, (s, z) in enumerate(zip(scales, zeros)))
        low, high = execute(text, {"$2": words, "$3": np.full_like(words, factors)})
        assert np.array_equal(low, (low_codes - zeros[0]) * scales[0])
        assert np.array_equal(high, (high_codes - zeros[1]) * scales[1])


def test_registers_are_those_of_the_constraints():
    """Two results, one word of codes, four copies of the scale: what the numbering above relies on."""
    source = inspect.getsource(triton_tile.fold_codes.fn)
    assert source.count('"=&r,=r,r,r,r,r,r"') == 2 and "pack=4" in source
    source = inspect.getsource(triton_tile.center_codes.fn)
    assert source.count('"=&r,=r,r,r,r,r,r"') == 1 and "pack=4" in source
