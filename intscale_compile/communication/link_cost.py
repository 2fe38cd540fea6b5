"""When a quantized collective pays on a link: a cost model, fitted to measured times, and thresholds from them.

The plain collective takes ``alpha + beta * sent`` for the bytes that a rank sends. The quantized one has its own ``alpha``
(the two collectives of the two-step form, arXiv 2412.04964, and its kernels), sends fewer bytes at the ``beta`` of its
transport, and takes ``gamma`` for each byte that it quantizes. All are fitted by least squares of relative errors.

The threshold of a wire format that was measured comes from the times themselves: the smallest size from which on the
quantized collective was the faster one at every size. The model stands in for formats that were not measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from .link_table import LOSSLESS, OPS, PLAIN, Key, Link, Times
from .message import WireFormat

NEVER = sys.maxsize  # a threshold that no message reaches
MARGIN = 1.05  # the quantized collective has to be faster by this, so that noise in a measurement makes nothing slower
ELEMENT = 2  # bytes of bf16, in which links are measured
# Without measurement, by backend and whether all ranks are on one host; chosen so that quantizing does not lose on a fast
# link. On one host NCCL runs over NVLink or PCIe, and which of them is not known here: two H200 gained over NVLink at every
# size, through the host's memory clearly from 8 MB on (benchmarks/results/2026-11-22-h200x2-allreduce.md). gloo copies
# through loopback, where quantizing on the CPU was slower than the copy at nearly every size (two ranks on two cores).
BUILT_IN = {("nccl", True): 8 << 20, ("nccl", False): 8 << 20, ("gloo", True): NEVER, ("gloo", False): 8 << 20}
BUILT_IN_OTHER = 32 << 20
# Links are measured in CUDA graphs. Without them the host launches each collective, and ours takes it 70 us longer than NCCL's
# (two H200: 100 and 31 us); up to about this size the GPU waits for the host.
LAUNCHED_BY_HOST = 8 << 20


@dataclass(frozen=True)
class Threshold:
    """From how many bytes on a collective is quantized.

    Attributes:
        nbytes: of the whole tensor; ``NEVER`` where the plain collective was faster at the largest size measured.
        source: ``"option"``, ``"measured"``, ``"fitted"`` (the model, for a wire format that was not measured),
            ``"built-in"`` (nothing was measured on this link) or ``"no CUDA graphs"`` (``LAUNCHED_BY_HOST``).
    """

    nbytes: int
    source: str

    def __str__(self) -> str:
        return f"{'never' if self.nbytes == NEVER else self.nbytes} ({self.source})"


def plain_bytes(op: str, ranks: int, nbytes: int) -> float:
    """Bytes that a rank sends in the plain collective (ring)."""
    return (2 if op == "all_reduce" else 1) * nbytes * (ranks - 1) / ranks


def wire_bytes(op: str, ranks: int, nbytes: int, wire: str, element: int = ELEMENT) -> int:
    """Bytes that a rank sends in the quantized collective, for a tensor of ``nbytes`` with elements of ``element`` bytes."""
    form = WireFormat.parse(wire)
    groups = form.slice_elements(nbytes // element, ranks) // form.group_size
    return (ranks - 1) * form.layout(groups).nbytes * (2 if op == "all_reduce" else 1)


@dataclass(frozen=True)
class CostModel:
    """Times of one kind of collective on one link, in microseconds and microseconds a byte.

    Attributes:
        alpha_plain, beta_plain: of the plain collective.
        alpha, beta, gamma: of the quantized one: latency, for each byte sent, for each byte quantized.
    """

    op: str
    ranks: int
    alpha_plain: float
    beta_plain: float
    alpha: float
    beta: float
    gamma: float

    def plain_us(self, nbytes: int) -> float:
        """Time of the plain collective."""
        return self.alpha_plain + self.beta_plain * plain_bytes(self.op, self.ranks, nbytes)

    def quantized_us(self, nbytes: int, wire: str) -> float:
        """Time of the quantized collective."""
        return self.alpha + self.beta * wire_bytes(self.op, self.ranks, nbytes, wire) + self.gamma * nbytes


def fit(op: str, ranks: int, times: Times) -> Optional[CostModel]:
    """The model that fits the measured times best; None where the plain or every quantized form was not measured."""
    plain = [((1.0, plain_bytes(op, ranks, n)), us) for n, us in times.get(Key(op, PLAIN), {}).items()]
    quantized = [
        ((1.0, float(wire_bytes(op, ranks, n, key.wire)), float(n)), us)
        for key, measured in times.items()
        if key.op == op and key.wire not in (PLAIN, *LOSSLESS)
        for n, us in measured.items()
    ]
    if not plain or not quantized:
        return None
    alpha, beta = _least_squares(plain)
    return CostModel(op, ranks, alpha, beta, *_least_squares(quantized))


def _least_squares(points: Sequence[tuple[tuple[float, ...], float]]) -> list[float]:
    """Coefficients, none of them negative, that make the sum of squared relative errors least.

    A term whose coefficient comes out negative is left out and the others are fitted again.
    """
    rows = np.array([terms for terms, _ in points]) / np.array([[us] for _, us in points])
    scale = rows.max(axis=0)
    kept = list(range(rows.shape[1]))
    while True:
        solution = np.linalg.lstsq(rows[:, kept] / scale[kept], np.ones(len(points)), rcond=None)[0]
        if len(kept) == 1 or solution.min() >= 0:
            break
        kept.pop(int(solution.argmin()))
    found = dict(zip(kept, solution / scale[kept]))
    return [float(found.get(i, 0.0)) for i in range(rows.shape[1])]


def threshold(link: Link, times: Times, op: str, wire: str, graphs: bool = True) -> Threshold:
    """From how many bytes on ``op`` is quantized on a link with these measured times; ``graphs``: in CUDA graphs."""
    found = _threshold(link, times, op, wire)
    if link.backend == "nccl" and not graphs and found.nbytes < LAUNCHED_BY_HOST:
        return Threshold(LAUNCHED_BY_HOST, "no CUDA graphs")
    return found


def _threshold(link: Link, times: Times, op: str, wire: str) -> Threshold:
    wire = str(WireFormat.parse(wire))
    plain, quantized = times.get(Key(op, PLAIN), {}), times.get(Key(op, wire), {})
    sizes = sorted(plain.keys() & quantized.keys())
    if sizes:
        return Threshold(_first_of_the_rest(sizes, [quantized[n] * MARGIN < plain[n] for n in sizes]), "measured")
    model = fit(op, link.ranks, times)
    if model is not None:
        sizes = sorted(plain)
        faster = [model.quantized_us(n, wire) * MARGIN < model.plain_us(n) for n in sizes]
        return Threshold(_first_of_the_rest(sizes, faster), "fitted")
    return Threshold(BUILT_IN.get((link.backend, link.hosts == 1), BUILT_IN_OTHER), "built-in")


def thresholds(link: Link, times: Times) -> dict[Key, Threshold]:
    """The thresholds of everything that was measured on a link, in the order of ``OPS``, widest formats first."""
    wires = [key for key in sorted(times, reverse=True) if key.wire not in (PLAIN, *LOSSLESS)]
    keys = [key for op in OPS for key in wires if key.op == op]
    return {key: threshold(link, times, *key) for key in keys}


def _first_of_the_rest(sizes: Sequence[int], faster: Sequence[bool]) -> int:
    """The smallest size from which on all are faster; ``NEVER`` where the largest is not."""
    found = NEVER
    for size, is_faster in zip(reversed(sizes), reversed(faster)):
        if not is_faster:
            break
        found = size
    return found


def predicted_gain(link: Link, times: Times, op: str, wire: str, nbytes: int) -> Optional[float]:
    """Time of the plain collective over that of another form; None where the link was not measured.

    Between measured sizes both times are interpolated; formats and sizes that were not measured go by the model.
    """
    wire = wire if wire in LOSSLESS else str(WireFormat.parse(wire))
    plain, quantized = times.get(Key(op, PLAIN), {}), times.get(Key(op, wire), {})
    sizes = sorted(plain.keys() & quantized.keys())
    if sizes and sizes[0] <= nbytes <= sizes[-1]:
        at, logs = math.log(nbytes), [math.log(n) for n in sizes]
        before, after = (np.interp(at, logs, [math.log(t[n]) for n in sizes]) for t in (plain, quantized))
        return math.exp(before - after)
    model = None if wire in LOSSLESS else fit(op, link.ranks, times)
    return None if model is None else model.plain_us(nbytes) / model.quantized_us(nbytes, wire)
