"""A picture: time against M on two logarithmic axes, one panel for each shape, with the two floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemm_results import OURS, Results, Shape
from reporting import along, line, path, picture, text

PEERS = {OURS: "#0072b2", "float_scale": "#56b4e9", "fp8": "#d55e00", "bf16": "#444444", "humming_iws": "#009e73"}
FLOORS = {"memory floor": "#999999", "int8 floor": "#cc79a7"}
WIDTH, HEIGHT, LEFT, TOP, COLUMNS = 460, 300, 56, 34, 2
LEGEND = 28

Series = Mapping[str, Sequence[tuple[float, float]]]


def floors(results: Results, shape: Shape) -> Series:
    """Microseconds that ours needs at least: its bytes at the copy bandwidth, its operations at the int8 peak."""
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in FLOORS}
    for m in results.tokens(shape):
        point = results.point(shape, m, OURS)
        if point and point.moved_bytes and results.bandwidth:
            lines["memory floor"].append((m, point.moved_bytes / results.bandwidth * 1e6))
        if results.int8_peak:
            lines["int8 floor"].append((m, 2 * m * shape[0] * shape[1] / results.int8_peak * 1e6))
    return lines


def times(results: Results, shape: Shape) -> Series:
    """Microseconds of the main peers."""
    return {
        peer: [(m, us) for m in results.tokens(shape) if (us := results.time(shape, m, peer)) is not None]
        for peer in PEERS
    }


def panel(title: str, lines: Series, bounds: Series, x0: float, y0: float) -> list[str]:
    """One pair of axes; ``lines`` have marks and set the scale, ``bounds`` are dashed and may leave it."""
    points = [point for series in lines.values() for point in series]
    if not points:
        return []
    values = [us for _, us in [*points, *bounds.get("memory floor", ())]]
    low, high = min(values) / 1.3, max(values) * 1.3
    m_low, m_high = min(m for m, _ in points), max(max(m for m, _ in points), 2 * min(m for m, _ in points))
    width, height = WIDTH - LEFT - 16, HEIGHT - TOP - 40

    def at(m: float, us: float) -> tuple[float, float]:
        return x0 + LEFT + width * along(m, m_low, m_high), y0 + TOP + height * (1 - along(us, low, high))

    out = [text(x0 + LEFT + width / 2, y0 + 22, title, extra='font-weight="bold"')]
    for us in (digit * 10**power for power in range(-1, 6) for digit in (1, 2, 5)):
        if low <= us <= high:
            left, y = at(m_low, us)
            out.append(line(left, y, left + width, y))
            out.append(text(left - 6, y + 4, f"{us:g} µs", "end"))
    for m in sorted({m for m, _ in points})[::2]:
        x, bottom = at(m, low)
        out.append(text(x, bottom + 16, f"{m:g}"))
    out.append(text(x0 + LEFT + width / 2, y0 + HEIGHT - 6, "tokens M"))
    for series, style in ((bounds, 'stroke-dasharray="5 4"'), (lines, 'stroke-width="2"')):
        for name, measured in series.items():
            color = (PEERS | FLOORS)[name]
            places = [at(m, us) for m, us in measured if m_low <= m <= m_high and low <= us <= high]
            out.append(path(places, color, style))
            if series is lines:
                out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in places]
    return out


def draw(results: Results) -> str:
    """The whole picture as SVG."""
    shapes = [shape for shape in results.shapes if any(times(results, shape).values())]
    body: list[str] = []
    names = [*(peer for peer in PEERS if peer in results.peers), *FLOORS]
    for place, name in enumerate(names):
        x = 16 + place * 128
        body.append(line(x, 16, x + 20, 16, (PEERS | FLOORS)[name], 'stroke-width="3"'))
        body.append(text(x + 25, 20, name, "start"))
    for place, shape in enumerate(shapes):
        row, column = divmod(place, COLUMNS)
        title = f"{shape[0]} x {shape[1]}"
        body += panel(title, times(results, shape), floors(results, shape), column * WIDTH, LEGEND + row * HEIGHT)
    width = max(COLUMNS * WIDTH, 16 + len(names) * 128)
    return picture(width, LEGEND + -(-len(shapes) // COLUMNS) * HEIGHT, body)
