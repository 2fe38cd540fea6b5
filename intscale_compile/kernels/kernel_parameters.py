"""The parameters of a compiled Triton kernel, in the order and form in which the driver takes them.

Behind every argument that is no compile-time constant Triton's launchers pass up to two scratch pointers; a tensor descriptor
becomes a tensor map, its sizes as int32 and its strides as int64. Whether a kernel has these parameters is asked of the driver
when the launch is prepared.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .c_launcher import CannotPrepare

INTEGERS = {
    "i1": "b",
    "u1": "B",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
}
FLOATS = {"fp32": "f", "f32": "f", "fp64": "d"}
MAP_BYTES = 128
# The driver's numbers of unsigned integers, by bytes an element. A copy moves bits, whatever they mean, and fills with zeros;
# Triton's own numbers differ from the driver's for some floating-point types.
UNSIGNED_TYPES = {1: 0, 2: 1, 4: 2}


@dataclass
class Parameters:
    """Memory with all parameters, and what is to be filled in.

    Attributes:
        block: the memory; addresses and tensor maps are zeros.
        offsets, sizes: of each parameter.
        pointers: ``(offset, tensor)``.
        maps: ``(offset, descriptor, metadata)``.
    """

    block: bytearray = field(default_factory=bytearray)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    pointers: list[tuple[int, Tensor]] = field(default_factory=list)
    maps: list[tuple[int, Any, Any]] = field(default_factory=list)

    def _place(self, size: int) -> int:
        offset = -(-len(self.block) // size) * size  # sizes are powers of 2
        self.block += bytes(offset + size - len(self.block))
        self.offsets.append(offset)
        self.sizes.append(size)
        return offset

    def add_number(self, kind: str, value: Any) -> None:
        """A number of one of Triton's types."""
        code = INTEGERS.get(kind) or FLOATS.get(kind)
        if code is None:
            raise CannotPrepare(f"an argument of type {kind}")
        struct.pack_into(f"<{code}", self.block, self._place(struct.calcsize(code)), value)

    def add_pointer(self, value: Any) -> None:
        """A tensor's address."""
        if not isinstance(value, Tensor):
            raise CannotPrepare(f"a pointer that is {type(value).__name__}")
        self.pointers.append((self._place(8), value))

    def add_descriptor(self, descriptor: Any, metadata: Any) -> None:
        """A tensor map with sizes and strides behind it."""
        if not isinstance(metadata, dict) or metadata.get("is_im2col") or metadata.get("fp4_padded"):
            raise CannotPrepare("a descriptor of another form")
        if metadata["elem_size"] not in UNSIGNED_TYPES or descriptor.padding == "nan":
            raise CannotPrepare(
                f"a descriptor of {metadata['elem_size']} bytes an element, filled with {descriptor.padding}"
            )
        self.maps.append((self._place(MAP_BYTES), descriptor, metadata))
        for size in descriptor.shape:
            self.add_number("i32", size)
        for stride in descriptor.strides:
            self.add_number("i64", stride)


def parameters_of(compiled: Any, names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> Parameters:
    """The parameters of ``compiled`` for one call.

    Args:
        compiled: what Triton compiled for just these arguments.
        names: of the kernel's arguments.
        args, kwargs: of the call; keywords that are no arguments are options of the compiler.

    Raises:
        CannotPrepare: something of a form that is not known here.
    """
    metadata = compiled.metadata
    for name, wanted in (("global_scratch_size", 0), ("profile_scratch_size", 0), ("launch_cooperative_grid", False),
                         ("num_ctas", 1)):  # fmt: skip
        if getattr(metadata, name, wanted) != wanted:
            raise CannotPrepare(f"a kernel with {name}={getattr(metadata, name)}")
    values = dict(zip(names, args)) | kwargs
    found, descriptions = Parameters(), iter(getattr(metadata, "tensordesc_meta", None) or ())
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            raise CannotPrepare(f"argument {name} of type {kind}")
        if kind.startswith("*"):
            found.add_pointer(values[name])
        elif kind.startswith("tensordesc"):
            found.add_descriptor(values[name], next(descriptions, None))
        else:
            found.add_number(kind, values[name])
    return found
