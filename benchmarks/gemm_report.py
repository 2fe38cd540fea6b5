"""Markdown tables of a run of the GEMM benchmark."""

from __future__ import annotations

from gemm_results import FOUR_BIT_PEERS, OURS, TARGETS, Results, Shape, judge
from reporting import machine, number, ratio, table

BANDWIDTH_TOKENS = 128  # above it the time is arithmetic


def time_table(results: Results, shape: Shape) -> str:
    """Microseconds, a row for each M and a column for each peer."""

    def cell(m: int, peer: str) -> str:
        point = results.point(shape, m, peer)
        return "wrong" if point and point.wrong else number(point.us if point else None)

    peers = results.peers
    return table(["M", *peers], [[str(m), *(cell(m, p) for p in peers)] for m in results.tokens(shape)])


def footnotes(results: Results, shape: Shape) -> list[str]:
    """Why cells of a shape are empty or wrong: one line for each peer and reason."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for point in results.points:
        if (point.n, point.k) == shape and point.problem:
            reasons.setdefault((point.peer, point.problem), []).append(point.m)
    return [f"- {peer}, M = {', '.join(map(str, ms))}: {reason}" for (peer, reason), ms in reasons.items()]


def best_four_bit(results: Results, shape: Shape, m: int) -> tuple[float, str] | None:
    """Time and name of the fastest 4-bit peer that is not ours."""
    times = [(results.time(shape, m, peer), peer) for peer in FOUR_BIT_PEERS]
    return min(((t, peer) for t, peer in times if t is not None), default=None)


def ratio_table(results: Results, shape: Shape) -> str:
    """How many times as long the main peers take."""
    rows = []
    for m in results.tokens(shape):
        ours = results.time(shape, m, OURS)
        best = best_four_bit(results, shape, m)
        cells = [ratio(results.time(shape, m, peer), ours) for peer in ("fp8", "bf16", "humming_iws")]
        rows.append([str(m), *cells, "–" if best is None else f"{ratio(best[0], ours)} ({best[1]})"])
    return table(["M", "fp8 / ours", "bf16 / ours", "humming_iws / ours", "best 4-bit peer / ours"], rows)


def bandwidth_table(results: Results, shape: Shape) -> str:
    """What ours moves per second where it is bound by memory, and its share of the copy bandwidth."""
    rows = []
    for m in results.tokens(shape):
        point = results.point(shape, m, OURS)
        if m <= BANDWIDTH_TOKENS and point and point.us:
            rate = point.moved_bytes / (point.us * 1e-6)
            share = "–" if not results.bandwidth else f"{100 * rate / results.bandwidth:.0f}"
            rows.append([str(m), f"{point.moved_bytes / 1e6:.2f}", f"{rate / 1e9:.0f}", share])
    return table(["M", "MB moved", "GB/s", "% of copy bandwidth"], rows)


def shape_report(results: Results, shape: Shape) -> str:
    """All tables of one shape."""
    parts = [
        f"## {shape[0]} x {shape[1]}",
        "Microseconds.",
        "\n".join([time_table(results, shape), "", *footnotes(results, shape)]).rstrip(),
    ]
    if OURS in results.peers:
        parts += ["How many times as long as ours.", ratio_table(results, shape), bandwidth_table(results, shape)]
    return "\n\n".join(parts) + "\n"


def claim_table(results: Results) -> str:
    """Integer against float scales in our own kernel: time with float scales over time with integer scales."""
    tokens = sorted({p.m for p in results.points})
    rows = []
    for m in tokens:
        pairs = [(results.time(s, m, "float_scale"), results.time(s, m, OURS)) for s in results.shapes]
        rows.append([str(m), *(ratio(*pair) for pair in pairs)])
    return table(["M", *(f"{n} x {k}" for n, k in results.shapes)], rows)


def targets_table(results: Results) -> str:
    """Every target with its verdict and its worst value."""
    rows = []
    for verdict in (judge(target, results) for target in TARGETS):
        bound = f"{'>' if verdict.target.strict else '>='} {verdict.target.least:.2f}"
        worst = "–" if verdict.worst is None else f"{verdict.worst:.3f} ({verdict.where})"
        rows.append([verdict.target.label, bound, verdict.outcome, worst, f"{verdict.measured} of {verdict.wanted}"])
    return table(["target", "bound", "verdict", "worst", "values"], rows)


def heading(results: Results) -> str:
    """What was measured, where and how."""
    lines = [machine(results.environment)]
    if results.bandwidth:
        lines.append(f"Copy bandwidth {results.bandwidth / 1e9:.0f} GB/s, bytes read and written.")
    lines += [f"- {name}: {title}" for name, title in results.titles.items()]
    return "\n".join(lines) + "\n"


def closing(results: Results) -> str:
    """The tables over all shapes, and what was left out."""
    parts = [
        "## Integer over float scales in our kernel",
        "Time with float scales over time with integer scales.",
        claim_table(results),
        "## Targets",
        targets_table(results),
    ]
    if results.notes:
        parts += ["## Left out", "\n".join(f"- {note}" for note in results.notes)]
    return "\n\n".join(parts) + "\n"


def full_report(results: Results) -> str:
    """Everything, as printed during a run."""
    return "\n".join([heading(results), *(shape_report(results, s) for s in results.shapes), closing(results)])
