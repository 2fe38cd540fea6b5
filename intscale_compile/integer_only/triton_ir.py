"""Triton's intermediate representation (TTIR) of generated kernels: getting it, and finding floating point in it.

TTIR is read rather than source: there every operation states its types, whatever the source calls it.
"""

from __future__ import annotations

import re
import struct
from typing import Any

FACTOR = 2.0**-16  # of the last conversion
_TYPE = re.compile(r"(?:(?<=\dx)|(?<![\w.%@$]))(?:b?f(?:16|32|64|80|128)|f8E\w+)\b")
_POINTER = re.compile(r"!tt\.ptr<(b?f\d+|f8E\w+)(?:, *\d+)?>")
_LOCATION = re.compile(r"\s*loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)")
_PRECISION = re.compile(r"inputPrecision = \w+")  # a product of integers states one, too
_OPERATION = re.compile(r"^(?:(?P<result>%[\w.$-]+)(?::\d+)? = )?\"?(?P<name>[A-Za-z_]+\.[\w.]+)\"?")
_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_NUMBER = re.compile(r"(?:dense<)?(-?\d+\.?\d*(?:[eE][+-]?\d+)?|0x[0-9A-Fa-f]+)>? :")
_SHAPES = {"tt.reshape", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans"}  # they copy numbers
_TOUCHES_MEMORY = ("tt.load", "tt.atomic", "tt.descriptor", "tt.experimental")


def float_operations(ttir: str) -> list[str]:
    """Operations with floating point in a kernel, but those of the last conversion; an empty list: there are none.

    The last conversion is an int32 made a float32, times ``2**-16``, rounded to a shorter type or not, and stored.
    """
    found: list[str] = []
    kinds: dict[str, str] = {}  # of the values of the last conversion: "factor", "integer" made a float, "result"
    for line in _PRECISION.sub("", _LOCATION.sub("", ttir)).splitlines():
        text = line.strip()
        operation = _OPERATION.match(text)
        if text.startswith("tt.func"):
            kinds = {}
        name, result = (operation["name"], operation["result"]) if operation else ("", None)
        reads = _POINTER.search(text) is not None and name.startswith(_TOUCHES_MEMORY)
        if not reads and not _TYPE.search(_POINTER.sub("", text)):
            continue
        kind = "" if reads else _kind(name, text, kinds)
        if kind and result:
            kinds[result] = kind
        else:
            found.append(text)
    return found


def _kind(name: str, text: str, kinds: dict[str, str]) -> str:
    """Which value of the last conversion an operation makes; empty if it is none of it."""
    operands = [kinds.get(value, "") for value in _VALUE.findall(text.partition(" = ")[2])]
    if name == "arith.constant":
        return "factor" if _is_factor(text) else ""
    if name == "arith.sitofp":
        return "integer" if re.search(r"\bi32>? to (?:tensor<[\dx]*)?f32\b|xi32> to tensor<(?:\d+x)*f32>", text) else ""
    if name == "arith.mulf":
        return "result" if sorted(operands) == ["factor", "integer"] else ""
    if name == "arith.truncf":
        return "result" if operands == ["result"] else ""
    return operands[0] if name in _SHAPES and len(operands) == 1 else ""


def _is_factor(text: str) -> bool:
    number = _NUMBER.search(text)
    if number is None or "0x" in number[1]:
        return False
    (value,) = struct.unpack("f", struct.pack("f", float(number[1])))
    return value == FACTOR


def triton_ir(name: str, source: str) -> str:
    """TTIR of a kernel that Inductor generated, compiled anew for the device that its source names; no GPU is needed.

    Args:
        name: of the kernel.
        source: of the file that holds it.
    """
    # Slow to import, and Triton may be missing where nothing is generated for a GPU.
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # A file of its own: what Inductor loaded itself has forgotten its configurations once it was compiled.
    kernel: Any = getattr(PyCodeCache.load(f"{source}\n# {name}, as the proof reads it\n"), name)
    meta, device, config = kernel.triton_meta, kernel.device_props, kernel.configs[0]
    chosen = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
    constants = {**meta["constants"], **{key: chosen[key] for key in kernel.fn.arg_names if key in chosen}}
    made = ASTSource(kernel.fn, dict(meta["signature"]), constexprs=constants, attrs=dict(meta["configs"][0]))
    target = GPUTarget(device.type, device.cc, device.warp_size or 32)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(made, target=target, options=options).asm["ttir"]
