"""What an import or an export did to each layer, as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConvertedLayer:
    """One imported or exported weight.

    Args:
        name: the layer, as the checkpoint names it.
        format: where it came from or where it went.
        shape: ``(out_features, in_features)``.
        group_size: of the checkpoint; -1 per channel.
        symmetric: whether it needs no zero points.
        snr_db: signal to noise of the weight after its scales were rounded, against the weight before; infinite where
            nothing changed.
        headroom_bits: proof that the int32 accumulator cannot overflow: bits between its largest value and 2**31.
    """

    name: str
    format: str
    shape: tuple[int, int]
    group_size: int
    symmetric: bool
    snr_db: float
    headroom_bits: float


@dataclass
class ImportReport:
    """Every weight that was converted, in order, and the linear layers that stayed in high precision.

    ``notes`` say what the user should know of single weights. Printing it gives a table.
    """

    layers: list[ConvertedLayer] = field(default_factory=list)
    unquantized: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; an infinite ``snr_db`` becomes None."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            layer["snr_db"] = layer["snr_db"] if math.isfinite(layer["snr_db"]) else None
        return {"layers": layers, "unquantized": list(self.unquantized), "notes": list(self.notes)}

    def __str__(self) -> str:
        head = ("layer", "format", "group", "zero points", "scale rounding, dB", "proof headroom, bits")
        rows = [head, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        if self.layers:
            worst = min(self.layers, key=lambda layer: layer.snr_db)
            lines.append(f"{len(self.layers)} weights; least: {_decibels(worst.snr_db)} dB in {worst.name}")
        if self.unquantized:
            lines.append(f"{len(self.unquantized)} linear layers in high precision: {', '.join(self.unquantized[:4])}")
        if self.notes:
            lines.append(self.notes[0] + (f" (and {len(self.notes) - 1} more notes)" if len(self.notes) > 1 else ""))
        return "\n".join(lines)


def _row(layer: ConvertedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        layer.format,
        "channel" if layer.group_size == -1 else str(layer.group_size),
        "none" if layer.symmetric else "yes",
        _decibels(layer.snr_db),
        f"{layer.headroom_bits:.1f}",
    )


def _decibels(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "exact"
