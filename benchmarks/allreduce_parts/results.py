"""What a run measured, and its JSON file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from .peers import PLAIN


@dataclass
class Point:
    """One peer at one size.

    Attributes:
        nbytes, peer: which.
        us: median of the slowest rank, microseconds of one call.
        samples_us: of that rank.
        error: norm of the difference to the fp64 sum, over the norm of that sum.
        identical: whether all ranks got the same bits.
        repeatable: whether the last timed call gave the bits of the first, checked one.
        graph: whether it was timed in a CUDA graph.
    """

    nbytes: int
    peer: str
    us: float
    samples_us: list[float]
    error: float
    identical: bool
    repeatable: bool = True
    graph: bool = False


@dataclass
class Results:
    """A run."""

    environment: dict[str, Any]
    backend: str
    link: str
    ranks: int
    points: list[Point] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """All sizes, ascending."""
        return sorted({point.nbytes for point in self.points})

    @property
    def peers(self) -> list[str]:
        """All peers, as they were measured."""
        return list(dict.fromkeys(point.peer for point in self.points))

    def point(self, nbytes: int, peer: str) -> Optional[Point]:
        """One peer at one size; None if it was not measured."""
        return next((p for p in self.points if p.nbytes == nbytes and p.peer == peer), None)

    def ratio(self, nbytes: int, peer: str) -> Optional[float]:
        """Time of the plain all-reduce over that of ``peer``."""
        plain, own = self.point(nbytes, PLAIN), self.point(nbytes, peer)
        return plain.us / own.us if plain and own else None

    @property
    def faults(self) -> list[str]:
        """Points whose results are not what they must be."""
        return [
            f"{p.peer} at {p.nbytes} bytes: {what}"
            for p in self.points
            for what, fine in (("ranks differ", p.identical), ("calls differ", p.repeatable))
            if not fine
        ]

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a JSON file of :meth:`save`."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "points": [Point(**point) for point in data["points"]]})
