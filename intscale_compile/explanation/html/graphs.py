"""The graph of each layer before and after each pass, side by side, changed nodes marked."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from html import escape
from typing import Optional

from ..folding import joined
from ..records import GraphPart, Records

CONTEXT = 3  # unchanged nodes that are shown around changed ones, where a pass is shown
MOST_ROWS = 15_000  # of all parts together, which keeps the page below 5 MB

Row = tuple[Optional[str], Optional[str], bool]  # left and right line, and whether they differ


def graph_parts(report: Records) -> str:
    """One box for each part of the graphs."""
    left, html = MOST_ROWS, []
    parts = sorted(report.parts, key=lambda part: (part.graph, not part.name))
    for place, part in enumerate(parts):
        rows = sum(max(len(a), len(b)) for (_, a), (_, b) in zip(part.stages, part.stages[1:]) if a != b)
        left -= rows + len(part.stages[0][1])
        if left < 0:
            html.append(
                f"<p>{len(parts) - place} more parts are left out to keep the page small: to_dict() has them.</p>"
            )
            break
        html.append(_part(part, opened=place == 0))
    return "\n".join(html)


def _title(part: GraphPart) -> str:
    if not part.name:
        return "outside of the repeated layers"
    return (
        part.name if len(part.alike) == 1 else f"{joined(part.alike)} ({len(part.alike)} alike; {part.name} is shown)"
    )


def _part(part: GraphPart, opened: bool) -> str:
    first, last = part.stages[0][1], part.stages[-1][1]
    changed = part.changed_by()
    idle = [name for name, _ in part.stages[1:] if name not in changed]
    steps = [
        _step(f"{name}: {_count(before, after)}", "before " + name, "after " + name, before, after, context=CONTEXT)
        for (_, before), (name, after) in zip(part.stages, part.stages[1:])
        if before != after
    ]
    if changed:
        whole = "all passes together: Dynamo's graph and what Inductor gets"
        body = _step(f"{whole}: {_count(first, last)}", "from Dynamo", "to Inductor", first, last, opened=True)
    else:
        body = "<p>No pass changed it.</p>" + _step(f"{len(first)} lines", "from Dynamo", "to Inductor", first, last)
    quiet = f'<p class="dim">Changed nothing here: {escape(", ".join(idle))}.</p>' if changed and idle else ""
    return (
        f'<details class="part" data-part="{escape(part.name)}"{" open" if opened else ""}>'
        f"<summary>graph {part.graph}: {escape(_title(part))}</summary>{body}{''.join(steps)}{quiet}</details>"
    )


def _count(before: Sequence[str], after: Sequence[str]) -> str:
    rows = [row for row in side_by_side(before, after) if row[2]]
    gone, new = sum(a is not None for a, _, _ in rows), sum(b is not None for _, b, _ in rows)
    return f"{gone} lines gone, {new} new"


def _step(
    title: str, left: str, right: str, before: Sequence[str], after: Sequence[str], context: int = -1, opened: bool = False
) -> str:  # fmt: skip
    rows = list(side_by_side(before, after))
    shown = range(len(rows)) if context < 0 else _near_changes(rows, context)
    html, previous = [], -1
    for i in shown:
        if i > previous + 1:
            html.append(_gap(i - previous - 1))
        html.append(_row(rows[i]))
        previous = i
    if previous + 1 < len(rows):
        html.append(_gap(len(rows) - previous - 1))
    return (
        f'<details class="step"{" open" if opened else ""}><summary>{escape(title)}</summary>'
        f"<table class=diff><thead><tr><th>{escape(left)}</th><th>{escape(right)}</th></tr></thead>"
        f"<tbody>{''.join(html)}</tbody></table></details>"
    )


def _near_changes(rows: Sequence[Row], context: int) -> list[int]:
    changed = [i for i, row in enumerate(rows) if row[2]]
    near = {j for i in changed for j in range(i - context, i + context + 1)}
    return sorted(near & set(range(len(rows))))


def _gap(count: int) -> str:
    return f'<tr><td colspan="2" class="gap">{count} unchanged</td></tr>'


def side_by_side(before: Sequence[str], after: Sequence[str]) -> Iterator[Row]:
    """Lines of both, equal ones beside each other."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        for i in range(max(b - a, d - c)):
            left = before[a + i] if a + i < b else None
            right = after[c + i] if c + i < d else None
            yield left, right, tag != "equal"


def _row(row: Row) -> str:
    left, right, changed = row
    if not changed:
        return f"<tr><td class=same>{_line(left)}<td class=same>{_line(right)}</tr>"
    return f"<tr>{_side(left, 'removed')}{_side(right, 'added')}</tr>"


def _side(line: Optional[str], kind: str) -> str:
    return "<td class=none>" if line is None else f"<td class={kind}>{_line(line)}"


def _line(line: Optional[str]) -> str:
    code, mark, kind = (line or "").partition("  # ")
    return escape(code) + (f"  <span class=dim># {escape(kind)}</span>" if mark else "")
