"""What a measured run says of other numbers of ranks and of a slower link: a projection, no measurement.

From the cost model fitted to the run (``communication.link_cost``): latencies ``alpha``, time for each byte sent ``beta``, of
the plain and of the quantized form, and time for each byte quantized ``gamma``. The projection keeps the latencies and the
betas, since every GPU has the whole of its link to itself, and changes what is counted:

* bytes that a rank sends, in the plain collective as in ours, by the number of ranks;
* work on each byte quantized: a rank encodes and sums (N-1)/N of the tensor and decodes all of it;
* for another link, both betas by its bandwidth.

Fitted to messages of 1 MB and more, since smaller ones go other ways. It knows nothing of latency that grows with the ranks, of
contention, or of other algorithms that a backend may choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reporting import size_name
from reporting import table as markdown

from intscale_compile.communication import link_cost
from intscale_compile.communication.link_cost import CostModel
from intscale_compile.communication.link_table import PLAIN as TABLE_PLAIN
from intscale_compile.communication.link_table import Key, Times

from .peers import FUSED, PLAIN, TWO_SHOT
from .report import heading
from .results import Results

RANKS = (2, 4, 8)
LEAST = 1 << 20  # bytes of the messages that are fitted
SIZES = tuple(size << 20 for size in (8, 32, 128))
PCIE = {"PCIe 4.0 x16, 25 GB/s": 25e9, "PCIe 5.0 x16, 50 GB/s": 50e9}  # assumed: what a copy reaches in one direction


def times_of(results: Results, fused: bool) -> Times:
    """The measured times of the plain all-reduce and of ours through one transport, as the cost model takes them."""
    times: Times = {}
    for point in results.points:
        if point.nbytes < LEAST:
            continue
        if point.peer == PLAIN:
            times.setdefault(Key("all_reduce", TABLE_PLAIN), {})[point.nbytes] = point.us
        elif point.peer != TWO_SHOT and point.peer.endswith(FUSED) == fused:
            times.setdefault(Key("all_reduce", point.peer.removesuffix(FUSED)), {})[point.nbytes] = point.us
    return times


def fitted(results: Results, fused: bool) -> CostModel | None:
    """The cost model of one transport; None where it was not measured."""
    return link_cost.fit("all_reduce", results.ranks, times_of(results, fused))


def work(ranks: int) -> float:
    """Bytes that a rank works on for each byte of the tensor."""
    return 1 + 2 * (ranks - 1) / ranks


def projected(model: CostModel, ranks: int, bandwidth: float | None = None) -> CostModel:
    """The model for another number of ranks, and for a link of so many bytes a second."""
    found = replace(model, ranks=ranks, gamma=model.gamma * work(ranks) / work(model.ranks))
    if bandwidth is not None:
        found = replace(found, beta=1e6 / bandwidth, beta_plain=1e6 / bandwidth)
    return found


def _rows(model: CostModel, link: str, bandwidth: float | None, wires: Sequence[str]) -> list[list[str]]:
    rows = []
    for ranks in RANKS:
        other = projected(model, ranks, bandwidth)
        kind = "fitted" if ranks == model.ranks and bandwidth is None else "projected"
        for nbytes in SIZES:
            plain = other.plain_us(nbytes)
            gains = [f"{plain / other.quantized_us(nbytes, wire):.2f}x" for wire in wires]
            rows.append([link, f"{ranks}, {kind}", size_name(nbytes), f"{plain:.0f}", *gains])
    return rows


def table(results: Results) -> str:
    """Markdown: the fitted parts, then gains over the plain all-reduce for 2, 4 and 8 ranks, on this link and over PCIe."""
    group, fused = fitted(results, False), fitted(results, True)
    model = fused or group
    if model is None:
        return f"{heading(results)}: nothing to project: the plain all-reduce and ours are needed, at several sizes"
    times = times_of(results, fused is not None)
    wires = [key.wire for key in times if key.wire != TABLE_PLAIN]
    rows = _rows(model, results.link, None, wires)
    if group is not None and results.backend == "nccl":  # the kernels of a GPU
        for name, bandwidth in PCIE.items():
            rows += _rows(group, name, bandwidth, wires)
    parts = [
        f"- {name}: alpha {m.alpha_plain:.1f} us plain, {m.alpha:.1f} us ours; beta {_rate(m.beta_plain)} plain, "
        f"{_rate(m.beta)} ours; gamma {_rate(m.gamma)}; {_misfit(m, results, name == 'one kernel')}"
        for name, m in (("one kernel", fused), ("process group", group))
        if m is not None
    ]
    gains = markdown(["link", "ranks", "bytes, bf16", "plain us", *wires], rows)
    title = f"**Projection, not a measurement**, from: {heading(results)}"
    return "\n".join([title, "", *parts, "", gains])


def _rate(us_per_byte: float) -> str:
    return f"{1e-3 / us_per_byte:.1f} GB/s" if us_per_byte else "none"


def _misfit(model: CostModel, results: Results, fused: bool) -> str:
    """The largest relative difference between the model and what it was fitted to."""
    worst = 0.0
    for key, measured in times_of(results, fused).items():
        for nbytes, us in measured.items():
            found = model.plain_us(nbytes) if key.wire == TABLE_PLAIN else model.quantized_us(nbytes, key.wire)
            worst = max(worst, abs(found / us - 1))
    return f"the fit is off by {worst:.0%} at most"
