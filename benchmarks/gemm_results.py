"""What a run of the GEMM benchmark keeps, and the targets it is held against."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OURS = "intscale"
OWN_PEERS = (OURS, "intscale_serial", "intscale_sb8", "intscale_g32", "intscale_ch", "intscale_w8a8", "float_scale")
FOUR_BIT_PEERS = (
    "tinygemm", "humming_g128", "humming_iws", "humming_ch", "humming_w4a16", "gemlite_w4a16", "gemlite_w4a8",
)  # fmt: skip
MAIN_PEERS = ("bf16", "fp8", "humming_iws")  # without one of these "every peer" is not judged in full
INT8_PEAK = {"A100": 624e12, "H100": 1979e12, "H200": 1979e12}  # operations per second, vendor's figures, dense

Shape = tuple[int, int]
Value = tuple[float | None, str]


@dataclass
class Point:
    """One peer at one size: the time of each replay divided by its calls, or why there is none."""

    n: int
    k: int
    m: int
    peer: str
    samples_us: list[float] = field(default_factory=list)
    copies: int = 0
    moved_bytes: int = 0
    error: float | None = None
    problem: str | None = None
    wrong: bool = False

    @property
    def us(self) -> float | None:
        """Median microseconds of one call."""
        return statistics.median(self.samples_us) if self.samples_us and not self.problem else None


@dataclass
class Results:
    """One run. ``bandwidth`` is of a large copy, in bytes per second, those read and those written together."""

    environment: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    bandwidth: float | None = None
    points: list[Point] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._index = {(p.n, p.k, p.m, p.peer): p for p in self.points}

    def add(self, point: Point) -> None:
        """Append a point; a second one for the same place replaces the first in every table."""
        self.points.append(point)
        self._index[point.n, point.k, point.m, point.peer] = point

    def point(self, shape: Shape, m: int, peer: str) -> Point | None:
        """The point measured there, if any."""
        return self._index.get((*shape, m, peer))

    def time(self, shape: Shape, m: int, peer: str) -> float | None:
        """Microseconds, or None."""
        point = self.point(shape, m, peer)
        return point.us if point else None

    @property
    def shapes(self) -> list[Shape]:
        """Shapes with a point, in the order of measurement."""
        return list(dict.fromkeys((p.n, p.k) for p in self.points))

    def tokens(self, shape: Shape) -> list[int]:
        """Sizes M with a point for a shape, ascending."""
        return sorted({p.m for p in self.points if (p.n, p.k) == shape})

    @property
    def peers(self) -> list[str]:
        """Peers with a point, in the order of their titles."""
        order = {name: place for place, name in enumerate(self.titles)}
        return sorted(dict.fromkeys(p.peer for p in self.points), key=lambda peer: order.get(peer, len(order)))

    @property
    def int8_peak(self) -> float | None:
        """int8 operations per second of the device, where known."""
        device = self.environment.get("device") or ""
        return next((peak for name, peak in INT8_PEAK.items() if name in device), None)

    def save(self, path: Path) -> None:
        """Write all of it as JSON; a run that is killed later leaves the last whole file."""
        part = path.with_suffix(path.suffix + ".part")
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Inverse of :meth:`save`."""
        stored = json.loads(path.read_text())
        return cls(**{**stored, "points": [Point(**point) for point in stored["points"]]})


@dataclass(frozen=True)
class Target:
    """A bound on the least of some values, each with the place where it was measured; None for one not measured."""

    label: str
    least: float
    values: Callable[[Results], Iterable[Value]]
    strict: bool = False  # the bound itself misses


@dataclass(frozen=True)
class Verdict:
    """What became of a target: PASS, MISS, "not measured", or "PASS in part" where some values are missing."""

    target: Target
    outcome: str
    worst: float | None
    where: str
    measured: int
    wanted: int


def _own_points(results: Results, least: int, most: int, shapes: Sequence[Shape] | None) -> Iterator[Point]:
    for point in results.points:
        in_range = least <= point.m <= most and (shapes is None or (point.n, point.k) in shapes)
        if point.peer == OURS and in_range:
            yield point


def _place(point: Point) -> str:
    return f"{point.n} x {point.k}, M={point.m}"


def bandwidth_share(least: int, most: int, shapes: Sequence[Shape]):
    """Share of the copy bandwidth that ours reaches; 0 where it has no right result."""

    def values(results: Results) -> Iterator[Value]:
        for shape in shapes:
            points = list(_own_points(results, least, most, [shape]))
            if not points or results.bandwidth is None:
                yield None, f"{shape[0]} x {shape[1]}"
                continue
            for point in points:
                if point.us is None:
                    yield 0.0, f"{_place(point)}: {point.problem}"
                else:
                    yield point.moved_bytes / (point.us * 1e-6) / results.bandwidth, _place(point)

    return values


def speedup(least: int, most: int, peers: Sequence[str] | None = None):
    """Time over ours of each peer named, or of all that are not ours; 0 where ours has no right result."""

    def values(results: Results) -> Iterator[Value]:
        needed = peers or MAIN_PEERS
        others = dict.fromkeys([*needed, *(() if peers else results.peers)])
        for point in _own_points(results, least, most, None):
            for peer in (p for p in others if peers or p not in OWN_PEERS):
                time = results.time((point.n, point.k), point.m, peer)
                if time is None and peer in needed:  # the other peers cannot be measured everywhere
                    yield None, f"{_place(point)}, {peer}"
                elif time is not None and point.us is None:
                    yield 0.0, f"{_place(point)}: {point.problem}"
                elif time is not None and point.us is not None:
                    yield time / point.us, f"{_place(point)}, {peer}"

    return values


TARGETS = (
    Target("a: M <= 16, 28672 x 4096, share of copy bandwidth", 0.88, bandwidth_share(1, 16, [(28672, 4096)])),
    Target(
        "a: M <= 16, 4096 x 14336 and 6144 x 4096, share of copy bandwidth",
        0.75,
        bandwidth_share(1, 16, [(4096, 14336), (6144, 4096)]),
    ),
    Target("a: M <= 16, 4096 x 4096, share of copy bandwidth", 0.55, bandwidth_share(1, 16, [(4096, 4096)])),
    Target("a: M <= 16, slower than no peer", 1.0, speedup(1, 16)),
    Target("b: 32 <= M <= 128, faster than every peer", 1.0, speedup(32, 128), strict=True),
    Target("b: 32 <= M <= 128, over humming_iws", 1.15, speedup(32, 128, ["humming_iws"])),
    Target("c: 256 <= M <= 1024, over fp8", 1.15, speedup(256, 1024, ["fp8"])),
    Target("c: 256 <= M <= 1024, over humming_iws", 1.4, speedup(256, 1024, ["humming_iws"])),
    Target("c: 256 <= M <= 1024, over bf16", 1.7, speedup(256, 1024, ["bf16"])),
    Target("c: M >= 2048, over fp8", 1.03, speedup(2048, 1 << 30, ["fp8"])),
    Target("c: M >= 2048, over humming_iws", 1.35, speedup(2048, 1 << 30, ["humming_iws"])),
    Target("c: M >= 2048, over bf16", 1.7, speedup(2048, 1 << 30, ["bf16"])),
    Target("d: M >= 1024, integer over float scale", 1.5, speedup(1024, 1 << 30, ["float_scale"])),
    Target("d: any M, integer over float scale", 1.0, speedup(1, 1 << 30, ["float_scale"])),
)


def judge(target: Target, results: Results) -> Verdict:
    """Compare the worst value with the target."""
    values = list(target.values(results))
    measured = [(value, where) for value, where in values if value is not None]
    if not measured:
        return Verdict(target, "not measured", None, "", 0, len(values))
    worst, where = min(measured)
    reached = worst > target.least if target.strict else worst >= target.least
    outcome = "MISS" if not reached else "PASS" if len(measured) == len(values) else "PASS in part"
    return Verdict(target, outcome, worst, where, len(measured), len(values))
