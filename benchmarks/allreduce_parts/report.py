"""Table and picture of a run."""

from __future__ import annotations

import math
from html import escape

from .peers import FUSED, PLAIN
from .results import Results

TITLES = {PLAIN: "plain", "two_shot": "two-shot, symmetric memory"}
COLOURS = {"two_shot": "#444444", "int8": "#0072b2", "int6": "#009e73", "int5": "#e69f00", "int4": "#d55e00"}
OTHER = "#cc79a7"


def size_name(nbytes: int) -> str:
    """Such as ``64 KB`` or ``32 MB``."""
    for unit, name in ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


def cell(results: Results, nbytes: int, peer: str) -> str:
    """Microseconds, ratio to the plain all-reduce, relative error; a fault in capitals."""
    point = results.point(nbytes, peer)
    if point is None:
        return "-"
    ratio = results.ratio(nbytes, peer)
    times = "" if peer == PLAIN or ratio is None else f" (**{ratio:.2f}x**)"
    faults = ("" if point.identical else ", RANKS DIFFER") + ("" if point.repeatable else ", CALLS DIFFER")
    return f"{point.us:.1f}{times}, {point.error:.2%}{faults}"


def heading(results: Results) -> str:
    """One line on what was measured."""
    facts = results.environment
    return (
        f"{results.ranks} ranks, {results.backend}, {results.link}, {facts.get('device')}; torch {facts.get('torch')}, "
        f"{str(facts.get('date'))[:10]}"
    )


def table(results: Results) -> str:
    """Markdown: a row for each size, a column for each peer."""
    rows = [["bytes, bf16", *(TITLES.get(peer, peer) for peer in results.peers)]]
    rows.append(["---"] * len(rows[0]))
    rows += [[size_name(n), *(cell(results, n, peer) for peer in results.peers)] for n in results.sizes]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    legend = (
        "Microseconds (times the plain all-reduce), relative error against the fp64 sum. Bits identical on all ranks "
        + ("everywhere." if not results.faults else "except where said.")
    )
    return "\n".join([heading(results), "", *lines, "", legend, *(f"- {note}" for note in results.notes)])


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def svg(results: Results) -> str:
    """Ratio to the plain all-reduce over the size: where a line crosses 1, quantizing begins to pay."""
    width, height, left, top = 620, 300, 52, 34
    lines = {
        peer: [(n, ratio) for n in results.sizes if (ratio := results.ratio(n, peer))]
        for peer in results.peers
        if peer != PLAIN
    }
    ratios = [ratio for line in lines.values() for _, ratio in line] + [1.0]
    low, high = min(ratios) / 1.15, max(ratios) * 1.15
    first, last = min(results.sizes, default=1), max(results.sizes, default=2)

    def at(nbytes: float, ratio: float) -> tuple[float, float]:
        across = math.log(nbytes / first) / math.log(last / first) if last > first else 0.5
        return left + width * across, top + height * (1 - math.log(ratio / low) / math.log(high / low))

    body = [_text(left + width / 2, 20, heading(results))]
    for ratio in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7):
        if low <= ratio <= high:
            y = at(first, ratio)[1]
            stroke = 'stroke="#000"' if ratio == 1 else 'stroke="#ddd"'
            body += [f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" {stroke}/>']
            body += [_text(left - 6, y + 4, f"{ratio:g}x", "end")]
    body += [
        _text(at(n, low)[0], top + height + 18, size_name(n)) for n in results.sizes[:: 1 + len(results.sizes) // 9]
    ]
    for place, (peer, line) in enumerate(lines.items()):
        colour = COLOURS.get(peer.removesuffix(FUSED), OTHER)
        dashes = "" if peer.endswith(FUSED) or peer == "two_shot" else 'stroke-dasharray="5 4"'
        path = " ".join("{:.1f},{:.1f}".format(*at(n, ratio)) for n, ratio in line)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" {dashes}/>')
        x, y = left + place % 3 * 205, top + height + 42 + place // 3 * 18
        body.append(
            f'<line x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3" {dashes}/>'
        )
        body.append(_text(x + 26, y, TITLES.get(peer, peer), "start"))
    total = top + height + 56 + 18 * (max(0, len(lines) - 1) // 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 24} {total}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )
