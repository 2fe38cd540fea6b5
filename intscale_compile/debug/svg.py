"""A recorded graph as SVG: one line of text for each node, arcs from each node to those that read it."""

from __future__ import annotations

import html
import math
from typing import Any

from ..compile.recorder.compilation import Stage
from ..compile.recorder.stages import Step
from .trace import is_ours

ROW, FONT, MARGIN = 18, 12, 12
WIDEST_ARC = 220
COLORS = {
    "changed": "#d9480f",  # by the pass
    "intscale": "#1864ab",
    "product": "#2b8a3e",
    "other": "#868e96",
}
_STYLE = (
    "text{font:12px monospace;fill:#212529} .value{fill:#868e96} path{fill:none;stroke:#adb5bd} "
    ".changed{stroke:#d9480f} .mark{fill:#fff4e6}"
)


def draw(stage: Stage) -> str:
    """An SVG picture of a stage; nodes that the pass wrote or changed are marked. Weights that are read are left out."""
    new = stage.new_names
    steps = [s for s in stage.steps if s.op != "output" and (s.op != "placeholder" or not _is_weight(stage, s.name))]
    rows = {step.name: i for i, step in enumerate(steps)}
    spans = [(rows[read], rows[s.name], s.name in new) for s in steps for read in s.reads if read in rows]
    left = MARGIN + max((_reach(a, b) for a, b, _ in spans), default=0)
    texts = [_text(step) for step in steps]
    width = left + 24 + int(0.62 * FONT * max((len(a) + len(b) + 3 for a, b in texts), default=10))
    height = 2 * MARGIN + ROW * len(steps)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        f"<title>{html.escape(str(stage))}</title><style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    parts += [_arc(left, *span) for span in spans]
    for step, (line, value) in zip(steps, texts):
        y = MARGIN + ROW * rows[step.name] + ROW // 2
        if step.name in new:
            parts.append(f'<rect class="mark" x="{left + 8}" y="{y - ROW // 2}" width="{width}" height="{ROW}"/>')
        kind = "changed" if step.name in new else "product" if step.name in stage.products else _kind(step)
        note = f"<title>{html.escape(step.module)}</title>" if step.module else ""
        parts.append(f'<circle cx="{left}" cy="{y}" r="4" fill="{COLORS[kind]}">{note}</circle>')
        shown = f'{html.escape(line)} <tspan class="value">{html.escape(value)}</tspan>'
        parts.append(f'<text x="{left + 12}" y="{y + 4}">{shown}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _is_weight(stage: Stage, name: str) -> bool:
    return not stage.meaning(name).startswith("argument")


def _kind(step: Step) -> str:
    return "intscale" if is_ours(step.target) else "other"


def _reach(first: int, last: int) -> int:
    """How far left an arc over some rows goes."""
    return 0 if last - first == 1 else min(WIDEST_ARC, 10 + int(9 * math.sqrt(last - first)))


def _arc(left: int, first: int, last: int, new: bool) -> str:
    top, bottom = (MARGIN + ROW * row + ROW // 2 for row in (first, last))
    x = left - _reach(first, last) * 4 // 3  # a cubic curve reaches three quarters of the way to its control points
    kind = ' class="changed"' if new else ""
    return f'<path{kind} d="M{left} {top}C{x} {top} {x} {bottom} {left} {bottom}"/>'


def _text(step: Step) -> tuple[str, str]:
    name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", str(step.target))
    name = name.removesuffix(".default")
    prefix = "intscale." if is_ours(step.target) else ""
    return f"{step.name} = {prefix}{name}({', '.join(map(_argument, step.args))})", step.value


def _argument(value: Any) -> str:
    text = getattr(value, "name", None) or str(value)
    return text if len(text) < 40 else text[:37] + "..."
