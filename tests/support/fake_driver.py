"""A CUDA driver that starts nothing, for tests of prepared launches on a CPU: it keeps what each launch was given."""

from __future__ import annotations

import ctypes
import itertools
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton

from intscale_compile.integrations.c_library import built_library
from intscale_compile.kernels import c_launcher, prepared

SOURCE = Path(__file__).with_name("fake_driver.c")
NUMBERS = {"i32": "i", "i64": "q", "i1": "b", "fp32": "f"}
KINDS = {
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
}  # fmt: skip


class Started(NamedTuple):
    """One launch: the kernel's name, grid, threads, whether it overlaps, and its arguments by name; pointers are numbers."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    overlap: bool
    stream: int
    arguments: dict[str, Any]


class _Raw(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32), ("shared", ctypes.c_uint32), ("attributes", ctypes.c_uint32),
        ("params", ctypes.c_uint32), ("sizes", ctypes.c_uint32 * 64), ("bytes", (ctypes.c_ubyte * 128) * 64),
    ]  # fmt: skip


class FakeDriver:
    """The driver, and a compiler of kernels for it.

    Attributes:
        library: the launcher on this driver, as ``c_launcher.library()``.
        extra: parameters that kernels have beside those of their signature, in bytes.
    """

    def __init__(self) -> None:
        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        self.path = built_library(SOURCE, "gcc", ("-std=c11", "-O1", f"-I{include}"))
        self.driver = ctypes.CDLL(str(self.path))
        self.library = c_launcher.open_library(str(self.path))
        self.extra: tuple[int, ...] = (8, 8)
        self.kernels: dict[int, tuple[str, list[tuple[str, str]]]] = {}
        self._numbers = itertools.count(1)
        self.compilations = 0

    def compile(self, kernel: Any, grid: tuple, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What Triton would compile, as far as a launch looks at it: ints of 1 and None are constants."""
        self.compilations += 1
        values = dict(zip(kernel.arg_names, args)) | kwargs
        signature, maps = {}, []
        constants = {p.name for p in kernel.params if p.is_constexpr}
        for name in kernel.arg_names:
            value = values[name]
            if name in constants or value is None or (isinstance(value, int) and value == 1):
                signature[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{KINDS[value.dtype]}"
            elif hasattr(value, "block_shape"):
                size = value.base.element_size()
                signature[name] = f"tensordesc<i{8 * size}{list(value.block_shape)}>"
                maps.append(
                    dict(swizzle=3, elem_size=size, elem_type=0, block_size=list(value.block_shape), fp4_padded=False)
                )
            else:
                signature[name] = "i32"
        function = next(self._numbers)
        names, sizes = self._parameters(signature, values)
        self.kernels[function] = kernel.fn.__name__, names
        every = (*sizes, *self.extra)
        self.driver.fake_describe(function, (ctypes.c_uint32 * len(every))(*every), len(every))
        metadata = SimpleNamespace(
            global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, num_ctas=1, tensordesc_meta=maps,
            launch_pdl=kwargs.get("launch_pdl", False),
        )  # fmt: skip
        packed = (kwargs.get("num_warps", 4), 1, 0)
        return SimpleNamespace(
            function=function, metadata=metadata, packed_metadata=packed, src=SimpleNamespace(signature=signature)
        )

    @staticmethod
    def _parameters(signature: dict[str, str], values: dict[str, Any]) -> tuple[list[tuple[str, str]], list[int]]:
        names, sizes = [], []
        for name, kind in signature.items():
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                rank = len(values[name].shape)
                names += [(name, "map"), *((f"{name}.size{i}", "i32") for i in range(rank))]
                names += [(f"{name}.stride{i}", "i64") for i in range(rank)]
                sizes += [128, *[4] * rank, *[8] * rank]
            else:
                names.append((name, "pointer" if kind.startswith("*") else kind))
                sizes.append(8 if kind.startswith("*") else struct.calcsize(NUMBERS[kind]))
        return names, sizes

    def started(self) -> list[Started]:
        """The launches since the last call of this method."""
        count = ctypes.c_int.in_dll(self.driver, "fake_count").value
        raw = (_Raw * 64).in_dll(self.driver, "fake_started")
        found = []
        for one in raw[:count]:
            kernel, names = self.kernels[one.function]
            arguments = {}
            for (name, kind), data in zip(names, one.bytes):
                code = {"pointer": "Q", "map": "16Q"}.get(kind) or NUMBERS[kind]
                values = struct.unpack_from(f"<{code}", bytes(data))
                arguments[name] = values if kind == "map" else values[0]
            found.append(Started(kernel, tuple(one.grid), one.threads, bool(one.attributes), one.stream, arguments))
        self.driver.fake_reset()
        return found

    def install(self, monkeypatch: Any) -> None:
        """Let this process believe that the CPU is GPU 0 with this driver, for prepared launches."""
        from intscale_compile.tensors import eager

        monkeypatch.setattr(prepared.c_launcher, "library", lambda: self.library)
        monkeypatch.setattr(prepared, "_compiled", self.compile)
        monkeypatch.setattr(prepared, "current_device", lambda: 0)
        monkeypatch.setattr(prepared, "raw_stream", lambda index: 7)
        monkeypatch.setattr(prepared, "take_counters", lambda device, count: torch.zeros(count, dtype=torch.int32))
        monkeypatch.setattr(eager, "gpu_index", lambda x: 0)
        prepared.forget_all()
        self.driver.fake_reset()
