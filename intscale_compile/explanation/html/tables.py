"""Tables of the page: layers with histograms of their group scales, and GEMMs with their times."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple, Optional, Union

from ..blocks import block_of
from ..folding import Fold, fold, joined
from ..graphs import together
from ..records import GemmReport, Records
from ..text import size_of

MOST_ROWS = 1500  # of single layers; above, those that repeat take the row of one
BINS, WIDTH, HEIGHT = 15, 76, 20  # of a histogram


class Cell(NamedTuple):
    """One cell: HTML, what it is sorted by where that is not its text, and its class."""

    html: str
    sort: Any = None
    kind: str = ""


Row = Sequence[Union[Cell, str]]


def html_table(
    headings: Sequence[str], rows: Sequence[Row], identity: str, foot: str = "", kinds: Sequence[str] = ()
) -> str:
    """A sortable table; a heading that starts with ``#`` is one of numbers. ``kinds``: classes of the rows."""
    head = "".join(
        f'<th scope="col"{" class=number" if h.startswith("#") else ""}>{escape(h.removeprefix("#"))}</th>' for h in headings
    )  # fmt: skip
    classes = [f" class={kind}" if kind else "" for kind in kinds or [""] * len(rows)]
    body = "\n".join(f"<tr{kind}>{''.join(map(_cell, row))}</tr>" for kind, row in zip(classes, rows))
    return (
        f'<div class="scroll"><table class="sortable{" folded" if any(kinds) else ""}" id="{identity}">'
        f"<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody>{foot}</table></div>"
    )


def _cell(cell: Union[Cell, str]) -> str:
    html, sort, kind = cell if isinstance(cell, Cell) else Cell(escape(cell))
    order = "" if sort is None else f' data-sort="{escape(str(sort))}"'
    return f"<td{order}{f' class={kind}' if kind else ''}>{html}</td>"


def number(value: Any, digits: int = 0) -> Cell:
    """A cell with a number, or a dash."""
    return Cell("-", "", "number") if value is None else Cell(f"{value:,.{digits}f}", value, "number")


def badge(quantized: bool, text: str, title: str = "") -> str:
    """A decision in its colour; ``title`` is shown when it is pointed at."""
    shown = f' title="{escape(title)}"' if title else ""
    return f'<span class="badge {"yes" if quantized else "no"}"{shown}>{escape(text)}</span>'


def layers_table(report: Records) -> str:
    """All layers; those that repeat have one row until the reader asks for each. Of very many there is nothing else."""
    folds = fold(report.layers, report.blocks)
    rows = [(_layer_row(one), "fold" if len(one.layers) > 1 else "") for one in folds]
    repeated = [layer for one in folds if len(one.layers) > 1 for layer in one.layers]
    note = ""
    if len(repeated) > MOST_ROWS:
        note = f'<p class="dim">{len(report.layers)} layers: those that repeat have one row; to_dict() has each.</p>'
    elif repeated:
        rows += [(_layer_row(Fold(layer.name, (layer,))), "single") for layer in repeated]
        note = '<label><input type="checkbox" data-unfold="layers"> a row for each of the repeated layers</label> '
    headings = (
        "layer", "N x K", "tokens", "decision", "activation", "group", "group scales", "#headroom, bits",
        "#bytes before", "#bytes after", "#GEMM", "kernel",
    )  # fmt: skip
    foot = (
        f'<tfoot><tr><td colspan="8">all parameters of the model</td><td class="number" id="bytes-before">'
        f'{report.bytes_before:,}</td><td class="number" id="bytes-after">{report.bytes_after:,}</td>'
        '<td colspan="2"></td></tr></tfoot>'
    )
    search = '<input type="search" data-table="layers" placeholder="filter layers" aria-label="filter layers"> '
    return search + note + html_table(headings, [row for row, _ in rows], "layers", foot, [kind for _, kind in rows])


def _layer_row(one: Fold) -> Row:
    layer = one.layers[0]
    rows, columns = layer.shape or (0, 0)
    size = Cell(escape(size_of(one)), rows * columns * (layer.experts or 1))
    decision = Cell(badge(layer.quantized, layer.decision, layer.explanation), layer.decision)
    kept = [number(sum(getattr(x, key) for x in one.layers)) for key in ("bytes_before", "bytes_after")]
    first: list[Union[Cell, str]] = [Cell(escape(one.name), None, "name"), size, layer.tokens, decision]
    if not layer.quantized:
        return [*first, "-", "-", Cell("-", ""), number(None), *kept, number(None), "-"]
    low, high = one.scale_range
    counts: dict[int, int] = {}
    for x in one.layers:
        for scale, count in x.scale_counts.items():
            counts[scale] = counts.get(scale, 0) + count
    group = Cell("channel", 0) if layer.group_size == -1 else str(layer.group_size)
    scales = Cell(f"{histogram(counts)}{low}..{high}", low)
    gemm = Cell(one.gemm, one.gemm.partition("..")[0], "number")
    return [*first, layer.activation, group, scales, number(one.headroom_bits, 1), *kept, gemm, layer.kernel]


def histogram(counts: dict[int, int]) -> str:
    """Groups by integer scale as bars: 1 to 15, or 15 equal ranges where scales have more than 4 bits."""
    top = max(BINS, *counts)
    bins = [0] * BINS
    for scale, count in counts.items():
        bins[(scale - 1) * BINS // top] += count
    most, step = max(bins), WIDTH / BINS
    bars = "".join(
        f"M{i * step:.1f} {HEIGHT}h{step - 1:.1f}v-{max(0.6, HEIGHT * count / most):.1f}h-{step - 1:.1f}z"
        for i, count in enumerate(bins) if count
    )  # fmt: skip
    words = ", ".join(f"{scale}: {count}" for scale, count in sorted(counts.items())[:40])
    return (
        f'<svg class="scales" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>groups by scale: {words}</title>'
        f'<path d="{bars}"/></svg>'
    )


def gemms_table(report: Records) -> str:
    """Predicted and measured times of the fused products, those that are alike in one row."""
    groups: dict[tuple, list[GemmReport]] = {}
    known = frozenset(report.blocks)
    for gemm in report.gemm_reports:
        inner = tuple(name.removeprefix(block_of(name, known)) for name in gemm.layers)
        groups.setdefault((inner, gemm.shape, gemm.tokens, gemm.kernel, gemm.moved_bytes), []).append(gemm)
    rows = [_gemm_row(group, known) for group in groups.values()]
    headings = (
        "weights", "#times", "N x K", "tokens", "kernel", "#MB moved", "#predicted, us", "limit", "#measured, us",
    )  # fmt: skip
    sums = [_sum([getattr(gemm, key) for gemm in report.gemm_reports]) for key in ("predicted_us", "measured_us")]
    predicted, measured = (_cell(number(value, 1)) for value in sums)
    foot = (
        f'<tfoot><tr><td>together</td><td class="number">{report.gemms}</td><td colspan="4"></td>{predicted}<td></td>'
        f"{measured}</tr></tfoot>"
    )
    return html_table(headings, rows, "gemms", foot)


def _sum(values: Sequence[Optional[float]]) -> Optional[float]:
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)


def _gemm_row(alike: Sequence[GemmReport], known: frozenset[str]) -> Row:
    first = alike[0]
    n, k = first.shape
    name = together(first.layers)
    blocks = list(dict.fromkeys(block_of(gemm.layers[0], known) for gemm in alike))
    if len(blocks) > 1:
        name = joined(blocks) + name[len(blocks[0]) :]
    moved = None if first.moved_bytes is None else first.moved_bytes / 1e6
    measured = _sum([gemm.measured_us for gemm in alike])
    return [
        Cell(escape(name), None, "name"),
        number(len(alike)),
        Cell(f"{n} x {k}", n * k),
        first.tokens,
        first.kernel,
        number(moved, 2),
        number(first.predicted_us, 2),
        first.limit or "-",
        number(None if measured is None else measured / len(alike), 1),
    ]
