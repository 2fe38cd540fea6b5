"""Assemble Triton kernels without a GPU and read facts from the machine code."""

from __future__ import annotations

import functools
import inspect
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# mma.sync, wgmma and tcgen05
TENSOR_CORE = ("IMMA", "IGMMA", "UTCIMMA")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_x]+)*)([^;]*);")
# Opcode, and the second word of the instruction, which says what it waits for and what will wait for it.
_CONTROLLED = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_x]+)*)[^;]*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* (0x[0-9a-f]{16}) \*/"
)
_ADDRESS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/", re.MULTILINE)
_BACKWARD_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """Opcode without modifiers: ``IMAD`` of ``IMAD.WIDE``."""
        return self.opcode.split(".")[0]


@dataclass
class Sass:
    """Machine code of one kernel and its resource usage."""

    compiled: Any  # what triton.compile returned
    registers: int
    spill_bytes: int

    @property
    def asm(self) -> dict[str, Any]:
        """Every form from TTIR to the cubin."""
        return self.compiled.asm

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.compiled.metadata.shared

    @property
    def arch(self) -> int:
        """Of the GPU: 90."""
        return self.compiled.metadata.target.arch

    @functools.cached_property
    def text(self) -> str:
        """What nvdisasm prints: only where somebody asks."""
        disassemble_together([self])
        return self.__dict__["text"]

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        """All of them, in order."""
        return [Instruction(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(self.text)]

    def count(self, base: str, within: list[Instruction] | None = None) -> int:
        """Number of instructions with this base opcode, in the whole kernel or in a part of it."""
        return sum(i.base == base for i in (self.instructions if within is None else within))

    def opcodes(self, within: list[Instruction] | None = None) -> Counter:
        """Base opcodes and how often each occurs."""
        return Counter(i.base for i in (self.instructions if within is None else within))

    def loops(self) -> list[list[Instruction]]:
        """Bodies of the loops, found by their backward branches; shortest first: waits out of line branch back far."""
        bodies = []
        for branch in self.instructions:
            if branch.base != "BRA":
                continue
            target = _BACKWARD_TARGET.search(branch.operands)
            start = int(target.group(1), 16) if target else branch.address
            if start < branch.address:
                bodies.append([i for i in self.instructions if start <= i.address <= branch.address])
        return sorted(bodies, key=len)

    def k_loops(self) -> list[list[Instruction]]:
        """Innermost loops with tensor-core instructions, shortest first: one for each group of warps that computes.

        What overlaps a shorter one is not another: it holds it, or is a wait out of line that branches into it.
        """
        found: list[list[Instruction]] = []
        for body in self.loops():
            start, end = body[0].address, body[-1].address
            overlaps = any(start <= inner[-1].address and inner[0].address <= end for inner in found)
            if not overlaps and any(i.base in TENSOR_CORE for i in body):
                found.append(body)
        return found

    def late_loads(self, stages_behind: int = 0) -> list[str]:
        """Loads from shared memory that may still wait in their queue when a stage is given back to the producer.

        A barrier among warps waits for no load whose value nothing has used: the load may be late by microseconds, when the
        stage has other contents already. Found by the scoreboards: a load sets one, whatever waits for that has it and, as
        they come back in order, all loads before it.

        Args:
            stages_behind: 1 where a stage is given back one stage later: the loads since the last wait for data may be
                under way.
        """
        pending: list[tuple[int, str]] = []  # scoreboard and load, oldest first
        at_barrier, late, current = [], [], 0
        for opcode, word in _CONTROLLED.findall(self.text):
            control = int(word, 16) >> 41
            waited, sets = control >> 11 & 63, control >> 5 & 7
            done = [i for i, (board, _) in enumerate(pending) if waited >> board & 1]
            if done:
                current = max(0, current - done[-1] - 1)
                pending = pending[done[-1] + 1 :]
            if opcode.startswith(("LDS", "LDSM")) and sets != 7:
                pending.append((sets, opcode))
            elif opcode.startswith("SYNCS.PHASECHK"):
                current = len(pending)  # those behind are of the stage that has come now
            elif opcode.startswith("BAR.SYNC"):
                at_barrier = pending[: current if stages_behind else None]
            elif opcode.startswith("SYNCS.ARRIVE") and "A1T0" in opcode:
                late += [load for _, load in at_barrier]
        return late

    def k_loop(self) -> list[Instruction]:
        """The shortest of :meth:`k_loops`."""
        for body in self.k_loops():
            return body
        raise AssertionError(f"no loop with tensor-core instructions; opcodes: {self.opcodes()}")


def assemble(function, signature: dict, constants: dict, target: GPUTarget, **options):
    """Compile a ``JITFunction`` for ``target``.

    Args:
        signature: type of each run-time argument, such as ``{"x_ptr": "*i8", "M": "i32"}``.
        constants: values of the ``constexpr`` arguments.
        options: ``num_warps``, ``num_stages``, and ``aligned``: names of arguments that are multiples of 16.
    """
    aligned = options.pop("aligned", ())
    names = function.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(ASTSource(function, full, constexprs=constexprs, attrs=attrs), target=target, options=options)


def assemble_generated(function, arguments: dict, target: GPUTarget | None = None):
    """Compile a kernel that Inductor generated, with the meta-data that ``fake_cuda.load_kernel`` returned for it."""
    meta = arguments["triton_meta"]
    constants, attributes = dict(meta["constants"]), dict(meta["configs"][0])
    source = ASTSource(function, dict(meta["signature"]), constexprs=constants, attrs=attributes)
    options = {"num_warps": arguments["num_warps"], "num_stages": arguments["num_stages"]}
    return triton.compile(source, target=target or GPUTarget("cuda", 90, 32), options=options)


def disassemble(compiled) -> Sass:
    """Machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
    return Sass(
        compiled,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spill_bytes=int(re.search(r"STACK:(\d+)", usage).group(1)),
    )


def disassemble_together(codes: Sequence[Sass]) -> None:
    """Read the instructions of several kernels for each GPU at once: most of nvdisasm's time is its start.

    It takes one file only, so the instructions of all kernels are put one behind the other, without their sections. Branches
    then name addresses instead of labels.
    """
    for arch in {code.arch for code in codes}:
        some = [code for code in codes if code.arch == arch]
        parts = [_instructions(code.asm["cubin"]) for code in some]
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(b"".join(parts))
            file.flush()
            # Without the analysis of data flow, which only names the targets of indirect branches.
            text = _tool("nvdisasm", "-hex", "-ndf", "-b", f"SM{arch}{'a' if arch >= 90 else ''}", file.name)
        starts = {int(found[1], 16): found.start() for found in _ADDRESS.finditer(text)}
        end = 0
        for code, part in zip(some, parts):
            begin, end = end, end + len(part)
            code.text = text[starts[begin] : starts.get(end)]


def code_of(item: pytest.Item, read: dict[str, Any], together: int) -> Any:
    """Machine code of what a test's mark ``assembles``, which is read together with that of the next tests of its file.

    Args:
        item: its mark's ``kernel`` is a function of some of the test's parameters; it returns a compiled kernel or a list.
        read: by test, what was read before it was asked for, or why it could not be.
        together: of how many tests at most; 1 where the next ones may run in another process.
    """
    if item.nodeid not in read:
        marked = [one for one in item.session.items if one.path == item.path and one.get_closest_marker("assembles")]
        found: list[Sass] = []
        for one in marked[marked.index(item) :][:together]:
            try:
                read[one.nodeid] = _assembled(one)
            except Exception as error:
                read[one.nodeid] = error
            else:
                found += read[one.nodeid] if isinstance(read[one.nodeid], list) else [read[one.nodeid]]
        disassemble_together(found)
    result = read.pop(item.nodeid)
    if isinstance(result, Exception):
        raise result
    return result


def _assembled(item: Any) -> Sass | list[Sass]:
    function = item.get_closest_marker("assembles").kwargs["kernel"]
    values = item.callspec.params if hasattr(item, "callspec") else {}
    compiled = function(**{name: values[name] for name in inspect.signature(function).parameters if name in values})
    return [disassemble(one) for one in compiled] if isinstance(compiled, list) else disassemble(compiled)


def _instructions(cubin: bytes) -> bytes:
    """The only section of an ELF file that holds code."""
    (offset,), (count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + 64 * i) for i in range(count)]  # name, …, offset, size
    strings = sections[names][4]
    (code,) = (cubin[s[4] : s[4] + s[5]] for s in sections if cubin.startswith(b".text.", strings + s[0]))
    return code


def _tool(name: str, *arguments) -> str:
    command = [str(NVIDIA_BIN / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
