"""The text table of an ``Explanation``."""

from __future__ import annotations

import sys

from ..passes.integer.bounds import table as integer_table
from .folding import Fold, FoldedCollective, fold, fold_collectives
from .records import Records

NEVER = sys.maxsize  # a threshold that no message reaches
HEADER = ("layer", "N x K", "tokens", "decision", "activation", "group", "scales", "headroom", "gemm", "kernel")
COLLECTIVES = (
    "collective", "times", "kind", "ranks", "tensor", "bytes", "decision", "from bytes", "threshold", "predicted gain",
)  # fmt: skip


def table(report: Records, folded: bool) -> str:
    """One line for each layer, or for each of those that repeat; then reasons, notes and totals."""
    folds = fold(report.layers, report.blocks) if folded else [Fold(x.name, (x,)) for x in report.layers]
    lines = _columns([HEADER, *map(row, folds)])
    if report.collectives:
        rows = fold_collectives(report.collectives, report.blocks if folded else ())
        lines += ["", *_columns([COLLECTIVES, *map(collective_row, rows)])]
    if report.integer_bounds:
        lines += ["", *integer_table(report.integer_ops, report.integer_bounds)]
    plain = {(one.reason, one.explanation) for one in report.collectives if not one.quantized}
    reasons = sorted(
        f"{a}: {b}" for a, b in {(one.reason, one.explanation) for one in report.layers if not one.quantized} | plain
    )
    return "\n".join([*lines, "", *reasons, *report.notes, *collective_totals(report), totals(report)])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows in aligned columns, with a rule under the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def collective_row(fold: FoldedCollective) -> tuple[str, ...]:
    """The cells of one collective, or of those that are alike."""
    one = fold.first
    return (
        fold.name,
        str(fold.count),
        one.kind,
        "-" if one.ranks is None else str(one.ranks),
        f"{one.dtype} {one.shape}",
        "by call" if one.nbytes is None else f"{one.nbytes:,}",
        one.decision,
        "-" if one.threshold is None else "never" if one.threshold == NEVER else f"{one.threshold:,}",
        one.threshold_source or "-",
        "-" if one.predicted_gain is None else f"{one.predicted_gain:.2f}",
    )


def collective_totals(report: Records) -> list[str]:
    """A line about all collectives, where there are any."""
    if not report.collectives:
        return []
    done = sum(one.quantized for one in report.collectives)
    forms = dict.fromkeys(one.wire for one in report.collectives if one.quantized) or {report.collectives[0].wire: None}
    verb = "replaced" if any(one.plan for one in report.collectives) else "quantized"
    words = f"{done} of {len(report.collectives)} collectives {verb} ({', '.join(forms)})."
    if any(one.threshold_source == "built-in" for one in report.collectives):
        words += " Thresholds marked built-in are guesses: intscale_compile.communication.tune_link measures the link."
    return [words]


def size_of(one: Fold) -> str:
    """``N x K``, with the number of experts before where there are several."""
    layer = one.layers[0]
    return " x ".join(map(str, ((layer.experts,) if layer.experts else ()) + layer.shape)) if layer.shape else "-"


def row(one: Fold) -> tuple[str, ...]:
    """The cells of one line."""
    layer = one.layers[0]
    if not layer.quantized:
        return (one.name, size_of(one), layer.tokens, layer.decision, "-", "-", "-", "-", "-", "-")
    low, high = one.scale_range
    return (
        one.name,
        size_of(one),
        layer.tokens,
        layer.decision,
        layer.activation,
        "channel" if layer.group_size == -1 else str(layer.group_size),
        f"{low}..{high}",
        f"{one.headroom_bits:.1f} bits",
        one.gemm,
        layer.kernel,
    )


def totals(report: Records) -> str:
    """The last line: what became of the whole model."""
    done = len(report.products) - len(report.fallbacks)
    total = (
        f"{done} of {len(report.products)} linear layers quantized, in {report.gemms} GEMMs with "
        f"{report.activation_quantizations} activation quantizations; {report.graphs} graph(s); "
        f"{report.quantized_fraction:.1%} of {report.parameters:,} parameters."
    )
    return total if done else f"NOTHING WAS QUANTIZED. {total}"
