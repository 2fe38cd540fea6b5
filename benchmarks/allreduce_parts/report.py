"""Table and picture of a run."""

from __future__ import annotations

from reporting import along, line, path, picture, size_name, text
from reporting import table as markdown

from .peers import FUSED, OUR_ONE_SHOT, OUR_TWO_SHOT, PLAIN, TORCH_ONE_SHOT, TWO_SHOT
from .results import Results

TITLES = {
    PLAIN: "plain",
    TWO_SHOT: "two-shot of PyTorch",
    TORCH_ONE_SHOT: "one-shot of PyTorch",
    OUR_ONE_SHOT: "one_shot",
    OUR_TWO_SHOT: "two_shot",
}
COLOURS = {
    TWO_SHOT: "#444444",
    OUR_ONE_SHOT: "#56b4e9",
    OUR_TWO_SHOT: "#999999",
    "int8": "#0072b2",
    "int6": "#009e73",
    "int5": "#e69f00",
    "int4": "#d55e00",
}
OTHER = "#cc79a7"


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
    header = ["bytes, bf16", *(TITLES.get(peer, peer) for peer in results.peers)]
    rows = [[size_name(n), *(cell(results, n, peer) for peer in results.peers)] for n in results.sizes]
    legend = (
        "Microseconds (times the plain all-reduce), relative error against the fp64 sum. Bits identical on all ranks "
        + ("everywhere." if not results.faults else "except where said.")
    )
    return "\n".join(
        [heading(results), "", markdown(header, rows), "", legend, *(f"- {note}" for note in results.notes)]
    )


def svg(results: Results) -> str:
    """Ratio to the plain all-reduce over the size: where a line crosses 1, quantizing begins to pay."""
    width, height, left, top = 620, 300, 52, 34
    lines = {
        peer: [(n, ratio) for n in results.sizes if (ratio := results.ratio(n, peer))]
        for peer in results.peers
        if peer != PLAIN
    }
    ratios = [ratio for measured in lines.values() for _, ratio in measured] + [1.0]
    low, high = min(ratios) / 1.15, max(ratios) * 1.15
    first, last = min(results.sizes, default=1), max(results.sizes, default=2)

    def at(nbytes: float, ratio: float) -> tuple[float, float]:
        return left + width * along(nbytes, first, last), top + height * (1 - along(ratio, low, high))

    body = [text(left + width / 2, 20, heading(results))]
    for ratio in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7):
        if low <= ratio <= high:
            y = at(first, ratio)[1]
            body.append(line(left, y, left + width, y, "#000" if ratio == 1 else "#ddd"))
            body.append(text(left - 6, y + 4, f"{ratio:g}x", "end"))
    shown = results.sizes[:: 1 + len(results.sizes) // 9]
    body += [text(at(n, low)[0], top + height + 18, size_name(n)) for n in shown]
    for place, (peer, measured) in enumerate(lines.items()):
        colour = COLOURS.get(peer.removesuffix(FUSED), OTHER)
        dashes = "" if peer.endswith(FUSED) or peer == "two_shot" else 'stroke-dasharray="5 4"'
        body.append(path([at(n, ratio) for n, ratio in measured], colour, f'stroke-width="2" {dashes}'))
        x, y = left + place % 3 * 205, top + height + 42 + place // 3 * 18
        body.append(line(x, y - 4, x + 20, y - 4, colour, f'stroke-width="3" {dashes}'))
        body.append(text(x + 26, y, TITLES.get(peer, peer), "start"))
    return picture(left + width + 24, top + height + 56 + 18 * (max(0, len(lines) - 1) // 3), body)
