"""The text table of an ``Explanation``."""

from __future__ import annotations

from .folding import Fold, fold
from .report import Explanation

HEADER = ("layer", "N x K", "tokens", "decision", "activation", "group", "scales", "headroom", "gemm", "kernel")


def table(report: Explanation, folded: bool) -> str:
    """One line for each layer, or for each of those that repeat; then reasons, notes and totals."""
    folds = fold(report.layers, report.blocks) if folded else [Fold(x.name, (x,)) for x in report.layers]
    rows = [HEADER, *map(row, folds)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    reasons = sorted({f"{layer.reason}: {layer.explanation}" for layer in report.fallbacks})
    return "\n".join([*lines, "", *reasons, *report.notes, totals(report)])


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


def totals(report: Explanation) -> str:
    """The last line: what became of the whole model."""
    done = len(report.layers) - len(report.fallbacks)
    total = (
        f"{done} of {len(report.layers)} linear layers quantized, in {report.gemms} GEMMs with "
        f"{report.activation_quantizations} activation quantizations; {report.graphs} graph(s); "
        f"{report.quantized_fraction:.1%} of {report.parameters:,} parameters."
    )
    return total if done else f"NOTHING WAS QUANTIZED. {total}"
