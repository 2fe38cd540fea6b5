"""Pages of ``explain``: one HTML file each, that needs no other file and no network."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ...versions import __version__
from ..changes import Changes, show
from ..folding import fold_collectives
from ..records import Records
from ..text import COLLECTIVES, collective_row, collective_totals, totals
from .graphs import graph_parts
from .tables import Cell, Row, badge, gemms_table, html_table, layers_table
from .tree import model_tree

FOLDER = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(report: Records) -> str:
    """The page of one explanation."""
    model = report.modules.get("", "") or "model"
    body = [
        f"<header><h1>{escape(model)}</h1>{_circumstances(report)}{_tiles(report)}</header><main>",
        _byte_bars(report),
        _remarks(report),
        f"<h2>Model</h2>{model_tree(report)}" if report.layers else "",
        f"<h2>Layers</h2>{layers_table(report)}" if report.layers else "<p>The model has no linear layer.</p>",
        f"<h2>GEMMs: predicted and measured time</h2>{_roofline(report)}{gemms_table(report)}" if report.gemms else "",
        f"<h2>Collectives</h2>{_collectives(report)}" if report.collectives else "",
        f"<h2>Integer-only: the bits of values</h2>{_bounds(report)}" if report.integer_bounds else "",
        f"<h2>Passes</h2>{_passes(report)}",
        f"<h2>Graphs before and after each pass</h2>{graph_parts(report)}" if report.parts else "",
        "</main>",
    ]
    return document(f"{model}: intscale explain", "\n".join(body))


def difference_page(difference: Changes) -> str:
    """The page of a difference between two explanations."""
    body = ["<header><h1>What differs</h1></header><main>"]
    if not difference:
        body.append("<p>Nothing differs.</p>")
    for title, changes in (("Totals and settings", difference.totals), ("Passes", difference.passes)):
        if changes:
            rows = [[change.name or change.what, show(change.before), show(change.after)] for change in changes]
            body.append(f"<h2>{title}</h2>" + html_table(("", "before", "after"), rows, title.split()[0].lower()))
    if difference.layers:
        table: list[Row] = [
            [Cell(escape(c.name), None, "name"), c.what, show(c.before), show(c.after)] for c in difference.folded()
        ]  # fmt: skip
        body.append("<h2>Layers</h2>" + html_table(("layer", "what", "before", "after"), table, "layers"))
    return document("intscale explain: what differs", "\n".join([*body, "</main>"]))


def document(title: str, body: str) -> str:
    """A whole HTML file. Its policy forbids every request to another file or host."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style></head>\n<body>\n{body}\n"
        f"<footer>intscale_compile {escape(__version__)}</footer>\n<script>\n{script}</script></body></html>\n"
    )


def _circumstances(report: Records) -> str:
    said = ", ".join(f"{key}={value}" for key, value in report.settings.items())
    return f'<p class="dim">on {escape(report.device)}{"; " + escape(said) if said else ""}</p>'


def _tiles(report: Records) -> str:
    done = len(report.products) - len(report.fallbacks)
    tiles = (
        (f"{done} of {len(report.products)}", "linear layers quantized", "layers-quantized"),
        (f"{report.quantized_fraction:.1%}", f"of {report.parameters:,} parameters", "fraction"),
        (f"{report.gemms}", "W4A8 GEMMs", "gemm-count"),
        (f"{report.activation_quantizations}", "activation quantizations", "quantization-count"),
        (f"{report.graphs}", f"graph{'s' * (report.graphs != 1)}, {_breaks(report)}", "graph-count"),
    )
    html = "".join(
        f'<div class="tile"><b id="{key}">{escape(value)}</b><span>{escape(words)}</span></div>' for value, words, key in tiles
    )  # fmt: skip
    return f'<div class="tiles">{html}</div>'


def _breaks(report: Records) -> str:
    count = len(report.graph_breaks)
    return "no break" if not count else f"{count} break{'s' * (count != 1)}"


def _byte_bars(report: Records) -> str:
    most = max(report.bytes_before, report.bytes_after, 1)
    bars = "".join(
        f"<span>{name}</span><i class={kind} style='width:{100 * size / most:.1f}%'></i><span>{size / 1e6:,.1f} MB</span>"
        for name, kind, size in (("before", "before", report.bytes_before), ("after", "after", report.bytes_after))
    )
    return f"<h2>Bytes of all parameters</h2><div class=bytes>{bars}</div>"


def _remarks(report: Records) -> str:
    reasons: dict[tuple[str, str], int] = {}
    for layer in (layer for layer in report.layers if not layer.quantized):
        key = str(layer.reason), layer.explanation
        reasons[key] = reasons.get(key, 0) + 1
    items = [
        f'<li><span class="badge no">{escape(name)}</span> {count} layer{"s" * (count != 1)}: {escape(text)}</li>'
        for (name, text), count in sorted(reasons.items())
    ]
    items += [
        f'<li><span class="badge no">{escape(name)}</span> {escape(text)}</li>'
        for name, text in sorted(
            {(str(one.reason), one.explanation) for one in report.collectives if not one.quantized}
        )
    ]
    items += [f"<li>{escape(note)}</li>" for note in report.notes]
    items += [f"<li>graph break: {escape(reason)}</li>" for reason in report.graph_breaks]
    warning = "" if len(report.fallbacks) < len(report.products) else f"<p><b>{escape(totals(report))}</b></p>"
    return f"<h2>Left alone, and remarks</h2>{warning}<ul class=plain>{''.join(items)}</ul>" if items else warning


def _roofline(report: Records) -> str:
    gpu = report.gpu
    if gpu is None:
        words = f'No roofline is known for {report.device}: explain(..., gpu="H100") predicts for another GPU.'
        return f'<p class="dim">{escape(words)}</p>'
    rates = f"{gpu['name']}: {gpu['bandwidth'] / 1e9:,.0f} GB/s, {gpu['int8'] / 1e12:,.0f} int8 TOPS ({gpu['source']})"
    words = f"Predicted by the roofline of {'an assumed' if report.gpu_assumed else 'the'} {rates}."
    if report.gpu_assumed:
        words += f" Measured times, where there are any, are those of this device: {report.device}."
    return f'<p class="dim">{escape(words)}</p>'


def _collectives(report: Records) -> str:
    rows: list[Row] = []
    for fold in fold_collectives(report.collectives, report.blocks):
        one = fold.first
        name, times, kind, ranks, tensor, size, decision, *rest = collective_row(fold)
        shown = Cell(badge(one.quantized, decision, one.explanation), decision)
        sized = Cell(size, one.nbytes or 0, "number")
        rows.append([Cell(escape(name), None, "name"), times, kind, ranks, tensor, sized, shown, *rest])
    words = "".join(f'<p class="dim">{escape(line)}</p>' for line in collective_totals(report))
    return words + html_table(COLLECTIVES, rows, "collectives")


def _bounds(report: Records) -> str:
    rows: list[Row] = [
        [one.op, str(report.integer_ops.get(one.op, 0)), one.value, f"{one.bits:.1f}", str(one.limit)]
        for one in report.integer_bounds
    ]
    return html_table(("op", "#calls", "largest value", "#bits", "#of"), rows, "bounds")


def _passes(report: Records) -> str:
    rows: list[Row] = []
    for name, count in report.pass_counts.items():
        changed = sum(name in part.changed_by() for part in report.parts)
        parts = f"{changed} of {len(report.parts)}" if changed else "-"
        rows.append([name, Cell(str(count), count, "number"), Cell(parts, changed, "number")])
    return html_table(("pass", "#matches", "#parts of the graphs changed"), rows, "passes")
