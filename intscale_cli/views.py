"""Results as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional

from .output import print_lines, print_table, size

MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


def quantized(summary: Any) -> None:
    """``intscale quantize``."""
    rows = [
        ("weight files", size(summary.bytes_before), size(summary.bytes_after)),
        ("", "", f"{summary.bytes_before / max(1, summary.bytes_after):.2f} times smaller"),
        ("parameters", f"{summary.parameters:,}", f"{summary.quantized_fraction:.1%} quantized"),
        ("weights", "", f"{summary.weights} quantized"),
    ]
    print_table([summary.method, "before", "after"], rows, ["before", "after"])
    if summary.left_alone:
        # Slow to import: commands that need it not begin at once.
        from intscale_compile.explanation.folding import fold

        print_lines("Left in high precision:")
        for one in fold(summary.left_alone, summary.blocks):
            print_lines(f"  {one.name}: {one.layers[0].reason}: {one.layers[0].explanation}")
    if summary.losses:
        worst = max(summary.losses, key=summary.losses.__getitem__)
        last = list(summary.losses)[-1]
        print_lines(
            f"relative error of the last block's output: {summary.losses[last]:.2e}; greatest: "
            f"{summary.losses[worst]:.2e} ({worst})"
        )
    print_lines(*summary.notes, f"saved in {summary.out} ({summary.seconds:.1f} s without loading and saving)")


def verified(found: Any) -> None:
    """``intscale inspect --verify``."""
    print_lines(str(found))


def explained(explanation: Any, report: Any, unfolded: bool) -> None:
    """``intscale inspect``."""
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.explanation.folding import fold
    from intscale_compile.explanation.text import HEADER, row, totals

    folds = fold(explanation.layers, () if unfolded else explanation.blocks)
    print_table(HEADER, map(row, folds), ["tokens"])
    _reasons(explanation.fallbacks)
    worst = None if report is None else min(report.layers, key=lambda layer: layer.snr_db, default=None)
    if worst is not None:
        print_lines(f"imported with its codes; rounding the scales: least {worst.snr_db:.1f} dB, in {worst.name}")
    print_lines(*explanation.notes, totals(explanation))


def _reasons(layers: Iterable[Any]) -> None:
    print_lines(*sorted({f"{layer.reason}: {layer.explanation}" for layer in layers if layer.reason}))


def explanation_dict(explanation: Any, report: Any) -> dict[str, Any]:
    """``intscale inspect --json``."""
    return {**explanation.to_dict(), "imported": None if report is None else report.to_dict()}


def planned(layers: list[Any], blocks: Sequence[str]) -> None:
    """``intscale inspect --plan``."""
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.explanation.folding import fold
    from intscale_compile.explanation.text import size_of

    rows = []
    for one in fold(layers, blocks):
        before, after = (sum(getattr(m, part) for m in one.layers) for part in ("bytes_before", "bytes_after"))
        rows.append((one.name, str(len(one.layers)), size_of(one), one.layers[0].decision, size(before), size(after)))
    print_table(["weight", "times", "N x K", "decision", "before", "after"], rows, ["times", "before", "after"])
    _reasons(layers)
    total = planned_dict(layers)
    print_lines(
        f"{total['quantized']} of {len(layers)} weights of products would be quantized: {size(total['bytes_before'])} to "
        f"{size(total['bytes_after'])}. From shapes alone: scales, headroom, kernels and graph breaks need the weights."
    )


def planned_dict(layers: list[Any]) -> dict[str, Any]:
    """``intscale inspect --plan --json``."""
    names = ("name", "shape", "experts", "quantized", "reason", "explanation", "bytes_before", "bytes_after")
    return {
        "quantized": sum(layer.quantized for layer in layers),
        "bytes_before": sum(layer.bytes_before for layer in layers),
        "bytes_after": sum(layer.bytes_after for layer in layers),
        "weights": [{name: getattr(layer, name) for name in names} for layer in layers],
    }


def evaluated(result: Any, model: str, against: Optional[str]) -> None:
    """``intscale eval``."""
    rows = [("perplexity", f"{result.perplexity:.4f}", "")]
    columns = [f"{result.sequences} x {result.tokens} tokens", model]
    if against is not None:
        ratio = result.perplexity / result.original_perplexity
        rows[0] = ("perplexity", f"{result.perplexity:.4f}", f"{result.original_perplexity:.4f}")
        snr = "equal" if result.snr_db is None else f"{result.snr_db:.2f} dB"
        floor = "none" if result.noise_floor_db is None else f"{result.noise_floor_db:.2f} dB"
        rows += [
            ("ratio", f"{ratio:.4f}", ""),
            ("signal to noise of the logits", snr, ""),
            ("the model's own noise floor", floor, ""),
            ("divergence of the next token", f"{result.kl:.2e} nats", ""),
            ("same most likely token", f"{result.same_token:.2%}", ""),
        ]
        columns.append(against)
    print_table(columns, (row[: len(columns)] for row in rows), columns[1:])


def tasks(results: dict[str, dict[str, Any]]) -> None:
    """``intscale eval --task``."""
    rows = []
    for name, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in metric:
                error = metrics.get(metric.replace(",", "_stderr,", 1))
                spread = f"{error:.4f}" if isinstance(error, float) else ""
                rows.append((name, metric.removesuffix(",none"), f"{value:.4f}", spread))
    print_table(["task", "metric", "value", "standard error"], rows, ["value", "standard error"])


def timed(timings: list[Any]) -> None:
    """``intscale bench``."""
    reference = timings[0].reference
    rows = [
        (f"{t.n} x {t.k}", t.tokens, f"{t.reference_us:.1f}", f"{t.ours_us:.1f}", f"{t.ratio:.2f}", t.kernel)
        for t in timings
    ]
    columns = ["N x K", "tokens", f"{reference}, us", "W4A8, us", "times as fast", "kernel"]
    print_table(columns, rows, columns[1:5])


def with_bar(rows: Iterable[Any], total: int, quiet: bool) -> Iterator[Any]:
    """The rows, with a bar on a terminal's stderr."""
    # Slow to import: commands that need it not begin at once.
    from rich.console import Console
    from rich.progress import track

    terminal = Console(stderr=True)
    yield from track(
        rows, "timing", total=total, console=terminal, transient=True, disable=quiet or not terminal.is_terminal
    )


def shown(checks: Iterable[Any], quiet: bool) -> Iterator[Any]:
    """``intscale doctor``: each check, printed when it is done."""
    for check in checks:
        if not quiet:
            print_lines(f"{MARKS[check.status]:<7}{check.name}: {check.found}")
            if check.mend:
                print_lines(f"       mend: {check.mend}")
        yield check
