"""Which form an all-reduce takes at which size: the plain collective, lossless on symmetric memory, or quantized.

``"bf16"`` and ``"auto"`` allow the lossless forms, ``"auto+int8"`` a wire format beside them. The lossless forms sum in fp32 in
rank order and round once; PyTorch's own one-shot and two-shot sums round to bf16 after every addition.

A :class:`Plan` says for every size which form is taken. It is made when a graph is compiled and is part of the graph, so all
ranks decide alike where their tables agree.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from ..errors import ConfigError
from .link_cost import LAUNCHED_BY_HOST, MARGIN
from .link_table import LOSSLESS, ONE_SHOT, PLAIN, TWO_SHOT, Key, Link, Times
from .message import WireFormat

AUTO, BF16 = "auto", "bf16"
LOSSLESS_MARGIN = 1.02  # a form on symmetric memory has to be faster than the plain collective by this
# Without measurement, on one host, by the largest number of ranks: up to how many bytes one-shot and two-shot are taken, and from
# how many bytes on a wire format that is allowed. The plain collective is taken above.
BUILT_IN: dict[int, tuple[int, int, int]] = {
    2: (1 << 20, 1 << 30, 8 << 20),  # two H100: benchmarks/results/2026-11-27-h100x4.md
    4: (256 << 10, 128 << 20, 8 << 20),  # four H100: there, too
    16: (128 << 10, 8 << 20, 8 << 20),
}


@dataclass(frozen=True)
class Allowed:
    """What the option ``communication`` allows.

    Attributes:
        lossless: whether the forms on symmetric memory may stand for the plain collective.
        wire: the wire format that is allowed, by its name; None: none.
    """

    lossless: bool
    wire: Optional[str]

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """Of ``"bf16"``, ``"auto"``, ``"auto+FORMAT"`` or ``"FORMAT"``.

        Raises:
            ConfigError: any other text.
        """
        if text in (AUTO, BF16):
            return cls(True, None)
        lossless = isinstance(text, str) and text.startswith(AUTO + "+")
        return cls(lossless, str(WireFormat.parse(text.removeprefix(AUTO + "+") if lossless else text)))

    def __str__(self) -> str:
        if not self.lossless:
            return str(self.wire)
        return AUTO if self.wire is None else f"{AUTO}+{self.wire}"


@dataclass(frozen=True)
class Plan:
    """The form of an all-reduce by its size.

    Attributes:
        steps: bytes of the whole tensor from which on a form is taken, ascending from 0, and the form: ``"plain"``,
            ``"one_shot"``, ``"two_shot"`` or a wire format.
        source: as in ``link_cost.Threshold``.
    """

    steps: tuple[tuple[int, str], ...]
    source: str = ""

    def form(self, nbytes: int) -> str:
        """The form at a size."""
        return next(form for least, form in reversed(self.steps) if nbytes >= least)

    @property
    def forms(self) -> tuple[str, ...]:
        """All forms, each once."""
        return tuple(dict.fromkeys(form for _, form in self.steps))

    def __str__(self) -> str:
        return ",".join(f"{least}:{form}" for least, form in self.steps)

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, text: str) -> Plan:
        """The inverse of ``str``.

        Raises:
            ConfigError: another text.
        """
        steps = []
        for part in text.split(","):
            least, _, form = part.partition(":")
            if (
                not least.isdigit()
                or not form
                or (form != PLAIN and form not in LOSSLESS and not WireFormat.parse(form))
            ):
                raise ConfigError(
                    f"{text!r} is no plan of an all-reduce: use bytes and forms, as in '0:one_shot,262144:plain'."
                )
            steps.append((int(least), form))
        if steps[0][0] != 0 or any(a >= b for (a, _), (b, _) in zip(steps, steps[1:])):
            raise ConfigError(f"{text!r} is no plan of an all-reduce: its sizes ascend from 0.")
        return cls(tuple(steps))


def merged(steps: Sequence[tuple[int, str]], source: str) -> Plan:
    """A plan without steps that change nothing."""
    kept: list[tuple[int, str]] = []
    for least, form in steps:
        if kept and kept[-1][0] == least:
            kept.pop()
        if not kept or kept[-1][1] != form:
            kept.append((least, form))
    return Plan(tuple(kept), source)


def plan(link: Link, times: Times, allowed: Allowed, graphs: bool = True, min_bytes: Optional[int] = None) -> Plan:
    """The plan of an all-reduce on a link.

    Args:
        link: what joins the ranks.
        times: measured on it; may be empty.
        allowed: forms beside the plain collective.
        graphs: whether it will run in CUDA graphs. Without them the host launches each collective, the plain one fastest.
        min_bytes: from how many bytes on the wire format is taken, whatever is faster; None: where it is faster.
    """
    found = _plan(link, times, Allowed(allowed.lossless, allowed.wire if min_bytes is None else None))
    if link.backend == "nccl" and not graphs:
        found = merged([(0, PLAIN), *_from(found, LAUNCHED_BY_HOST)], "no CUDA graphs")
    if min_bytes is not None and allowed.wire is not None:
        below = [step for step in found.steps if step[0] < min_bytes]
        found = merged([*below, (min_bytes, allowed.wire)], found.source)
    return found


def _from(found: Plan, nbytes: int) -> list[tuple[int, str]]:
    """The steps of a plan from some size on."""
    return [(nbytes, found.form(nbytes)), *(step for step in found.steps if step[0] > nbytes)]


def _plan(link: Link, times: Times, allowed: Allowed) -> Plan:
    forms = [*(LOSSLESS if allowed.lossless else ()), *([allowed.wire] if allowed.wire else [])]
    plain = times.get(Key("all_reduce", PLAIN), {})
    measured = {form: times[Key("all_reduce", form)] for form in forms if Key("all_reduce", form) in times}
    sizes = sorted(n for n in plain if any(n in known for known in measured.values()))
    if sizes:
        steps = [(n if i else 0, _fastest(n, plain[n], measured)) for i, n in enumerate(sizes)]
        return merged(steps, "measured")
    if link.backend != "nccl" or link.hosts > 1:
        return Plan(((0, PLAIN),), "built-in")
    return _built_in(link, allowed)


def _fastest(nbytes: int, plain_us: float, measured: dict[str, dict[int, float]]) -> str:
    """The form that was fastest at a measured size; another than the plain one by a margin, of noise or for its error."""
    best, best_us = PLAIN, plain_us
    for form, known in measured.items():  # the lossless ones first
        margin = LOSSLESS_MARGIN if form in LOSSLESS else MARGIN
        if nbytes in known and known[nbytes] * (margin if best == PLAIN or form not in LOSSLESS else 1.0) < best_us:
            best, best_us = form, known[nbytes]
    return best


def _built_in(link: Link, allowed: Allowed) -> Plan:
    one_shot, two_shot, quantized = next(
        found for ranks, found in sorted(BUILT_IN.items()) if link.ranks <= ranks or ranks == max(BUILT_IN)
    )
    steps = [(0, ONE_SHOT), (one_shot + 1, TWO_SHOT), (two_shot + 1, PLAIN)] if allowed.lossless else [(0, PLAIN)]
    if allowed.wire is not None:
        steps = [*(step for step in steps if step[0] < quantized), (quantized, allowed.wire)]
    return merged(steps, "built-in")
