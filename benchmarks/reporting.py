"""How the benchmarks say what they measured: tables in Markdown, sizes in bytes, the machine, and pictures in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

NOTHING = "–"  # a cell without a value
COLOURS = ("#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9", "#444444", "#999999")


# --- tables -------------------------------------------------------------------------------------------------------------


def row(cells: Iterable[object]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(header: Sequence[str]) -> str:
    """The first two lines of a table whose rows are printed as they are measured."""
    return f"{row(header)}\n{row(['---'] * len(header))}"


def table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    return "\n".join([head(header), *map(row, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value:.{max(0, digits - len(str(int(abs(value)))))}f}"


def ratio(over: float | None, under: float | None) -> str:
    """``over / under`` with two decimals; a dash where one of them is missing."""
    return NOTHING if over is None or under is None else f"{over / under:.2f}"


def size_name(nbytes: int) -> str:
    """Such as ``64 KB`` or ``32 MB``, in powers of 1024."""
    for unit, name in ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


def machine(facts: Mapping[str, Any], *names: str) -> str:
    """``device, torch 2.11.0, ...`` of :func:`timing.environment`, without what is not known; all of it without ``names``."""
    chosen = {name: facts.get(name) for name in names or facts}
    known = {name: value for name, value in chosen.items() if value is not None}
    return ", ".join(str(value) if name == "device" else f"{name} {value}" for name, value in known.items())


# --- pictures -----------------------------------------------------------------------------------------------------------


def text(x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "#ddd", extra: str = "") -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def path(places: Iterable[tuple[float, float]], colour: str, extra: str = 'stroke-width="2"') -> str:
    """A line through several places."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {extra}/>'


def rectangle(x: float, y: float, width: float, height: float, colour: str, note: str = "") -> str:
    """A filled rectangle; ``note`` is shown under the pointer."""
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"'
    return f"{shape}><title>{escape(note)}</title></rect>" if note else f"{shape}/>"


def along(value: float, low: float, high: float) -> float:
    """Where ``value`` lies on a logarithmic axis from ``low`` to ``high``: 0 to 1; the middle of an axis of one value."""
    return math.log(value / low) / math.log(high / low) if high > low else 0.5


def picture(width: float, height: float, body: Iterable[str]) -> str:
    """An SVG file on white."""
    first = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
    return "\n".join([first, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"
