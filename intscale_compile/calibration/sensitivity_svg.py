"""A small SVG writer: one horizontal bar for each layer, colored by the kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
ROW, TOP, BAR, MARGIN, LETTER = 16, 44, 420, 90, 6.2


def draw(title: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """The picture.

    Args:
        title: one line above.
        bars: name, length (not negative) and a note behind the bar; bars of names with one last part have one color.
    """
    left = 16 + LETTER * max((len(name) for name, _, _ in bars), default=0)
    longest = max((value for _, value, _ in bars), default=0.0) or 1.0
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name, _, _ in bars))
    body = [f'<text x="{left:.0f}" y="24" font-weight="bold">{escape(title)}</text>']
    for place, (name, value, note) in enumerate(bars):
        y, width = TOP + ROW * place, BAR * max(value, 0.0) / longest
        color = COLORS[kinds.index(name.rsplit(".", 1)[-1]) % len(COLORS)]
        body.append(f'<text x="{left - 6:.0f}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        body.append(f'<rect x="{left:.0f}" y="{y + 2}" width="{width:.1f}" height="{ROW - 4}" fill="{color}"/>')
        body.append(f'<text x="{left + width + 5:.1f}" y="{y + 11}" fill="#555">{value:.2g} ({escape(note)})</text>')
    size = f"{left + BAR + MARGIN + 30:.0f} {TOP + ROW * len(bars) + 10}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"
