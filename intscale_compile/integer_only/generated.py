"""Kernels in the files that Inductor generates, and floating point in them: C++ by its text, Triton by its TTIR."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import NamedTuple

from .triton_ir import FACTOR, float_operations, triton_ir

_FLOAT = re.compile(r"\b(float|double|half|bfloat16|float16|float32|float64|"
                    r"std::(?:exp|exp2|log|sqrt|rsqrt|pow|tanh|round|floor|ceil|erf))\b")  # fmt: skip
_TRUTH = re.compile(r"VecMask<float, ?\d+>")  # Inductor's type for vectors of truth values
_COMMENT = re.compile(r"^\s*//.*$", re.MULTILINE)
_LAST = str(FACTOR)


class Kernel(NamedTuple):
    """A generated kernel; ``language`` is the method of Inductor's compiler that takes it, ``name`` empty for C++."""

    language: str
    name: str
    source: str


def kernels_of(modules: Sequence[str]) -> list[Kernel]:
    """The kernels in the texts of Inductor's modules, in order: ``async_compile.triton(name, source, ...)`` and the like."""
    found = []
    for text in modules:
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda node: node.lineno):
            owner = call.func.value if isinstance(call.func, ast.Attribute) else None
            if isinstance(owner, ast.Name) and owner.id == "async_compile" and call.args:
                texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                if texts:
                    found.append(Kernel(call.func.attr, texts[0] if len(texts) > 1 else "", texts[-1]))  # type: ignore[attr-defined]
    return found


def float_code(kernel: Kernel) -> list[str]:
    """Places with floating point in a kernel, but the last conversion's; a kernel that cannot be read is one."""
    if kernel.language == "triton":
        return [f"{kernel.name}: {line}" for line in float_operations(triton_ir(kernel.name, kernel.source))]
    if kernel.language.startswith("cpp"):
        return float_lines(kernel.source)
    return [f"{kernel.name or 'a kernel'}: in a language that the proof cannot read ({kernel.language})"]


def float_lines(kernel: str) -> list[str]:
    """Lines of a C++ kernel with floating point; none where it holds the last conversion and no other floating point."""
    text = _COMMENT.sub("", _TRUTH.sub("", kernel))
    lines = [line.strip() for line in text.splitlines() if _FLOAT.search(line)]
    if not lines or _is_last_conversion(text, lines):
        return []
    return lines


def _is_last_conversion(text: str, lines: list[str]) -> bool:
    """Whether the lines are arguments, conversions of an integer, and one factor of 2**-16."""
    arguments = [line for line in lines if re.search(r"\bfloat\s*\*|bfloat16\s*\*|half\s*\*", line)]
    others = [line for line in lines if line not in arguments]
    # Without vectors the product with 2**-16 names its type.
    conversion = re.compile(r"convert<|static_cast<|Vectorized<float>|\.store\(|= float\(tmp\d+ \* tmp\d+\);$")
    others_float = re.compile(r"std::|double|float64")
    integers = [line for line in others if re.search(r"convert<float>|static_cast<float>\(tmp", line)]
    products = [line for line in others if "= float(" in line]
    # In the loop over vectors, and over what is left of them.
    once = max(len(integers), len(products)) <= 2 * max(1, len(arguments))
    kinds = all(conversion.search(line) and not others_float.search(line) for line in others)
    return _LAST in text and bool(others) and once and kinds
