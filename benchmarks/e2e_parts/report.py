"""Table, JSON and picture of an end-to-end run."""

from __future__ import annotations

import dataclasses
from typing import Any

from reporting import COLOURS, line, picture, rectangle, text
from reporting import table as markdown

from .measure import PeerResult, Point
from .peers import PEERS

BASE = "bf16"


def ratio(results: dict[str, PeerResult], peer: str, point: Point) -> float | None:
    """Speed of ``peer`` over bf16 at a point; None where one of them was not measured."""
    base, own = (results[name].times_us.get(point.name) if name in results else None for name in (BASE, peer))
    return base / own if base and own else None


def cell(results: dict[str, PeerResult], peer: str, point: Point) -> str:
    """Tokens per second (decode) or milliseconds (prefill), and the ratio to bf16."""
    own = results[peer].times_us.get(point.name)
    if own is None:
        return "-"
    text = f"{point.size / own * 1e6:.0f} tok/s" if point.kind == "decode" else f"{own / 1e3:.2f} ms"
    over = ratio(results, peer, point)
    return f"{text} ({over:.2f})" if over and peer != BASE else text


def table(results: dict[str, PeerResult], points: list[Point]) -> str:
    """Markdown: one row a peer; speeds with their ratio to bf16, then memory and times of preparation."""
    first = points[0].name
    header = ["", *(p.name for p in points), "weights GB", "peak GB", "quantize s", f"compile s ({first})"]
    rows = []
    for name, result in results.items():
        peak = max(result.peak_bytes.values(), default=0)
        rows.append(
            [
                PEERS[name].title,
                *(cell(results, name, p) for p in points),
                f"{result.weights_bytes / 1e9:.2f}",
                f"{peak / 1e9:.2f}",
                f"{result.quantize_s:.1f}",
                f"{result.compile_s.get(first, float('nan')):.1f}",
            ]
        )
    return markdown(header, rows)


def traces(results: dict[str, PeerResult], points: list[Point], most: int = 10) -> str:
    """Where the time of each point goes, kernel by kernel."""
    lines = []
    for point in points:
        for name, result in results.items():
            if point.name in result.kernels:
                lines.append(f"{point.name}, {name} ({result.times_us[point.name]:.0f} us):")
                lines += [f"    {n:4d} x {us:8.2f} us  {kernel}" for kernel, n, us in result.kernels[point.name][:most]]
    return "\n".join(lines)


def as_json(results: dict[str, PeerResult], points: list[Point], environment: dict[str, Any], model: str) -> dict:
    """Everything that was measured."""
    return dict(
        model=model,
        environment=environment,
        points=[dataclasses.asdict(p) for p in points],
        peers={name: dataclasses.asdict(result) for name, result in results.items()},
    )


def svg(results: dict[str, PeerResult], points: list[Point], title: str) -> str:
    """Bars of speed over bf16, one group a point."""
    names = [n for n in results if any(ratio(results, n, p) for p in points)]
    bar, gap, height, left, top = 14, 26, 220, 46, 44
    group = bar * len(names) + gap
    highest = max([1.0, *(r for n in names for p in points if (r := ratio(results, n, p)))]) * 1.08
    width = left + group * len(points) + 10
    total = height + top + 40 + 18 * ((len(names) + 1) // 2)
    parts = [text(left, 20, title, "start", 'font-size="13"')]
    for half in range(1, int(2 * highest) + 1):
        y = top + height - half / 2 / highest * height
        parts += [line(left, y, width - 10, y), text(left - 6, y + 4, f"{half / 2:g}x", "end")]
    for i, point in enumerate(points):
        x = left + i * group + gap / 2
        for j, name in enumerate(names):
            value = ratio(results, name, point)
            if value:
                tall, note = value / highest * height, f"{PEERS[name].title}: {value:.2f}"
                parts.append(
                    rectangle(x + j * bar, top + height - tall, bar - 2, tall, COLOURS[j % len(COLOURS)], note)
                )
        parts.append(text(x + bar * len(names) / 2, top + height + 16, point.name))
    for j, name in enumerate(names):
        x, y = left + (j % 2) * 330, top + height + 40 + 18 * (j // 2)
        parts.append(rectangle(x, y - 9, 10, 10, COLOURS[j % len(COLOURS)]))
        parts.append(text(x + 16, y, PEERS[name].title, "start"))
    return picture(width, total, parts)
