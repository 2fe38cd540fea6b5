"""What became of one collective: plain data, for ``explain`` and the debug output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class CollectiveReport:
    """One collective of a compiled graph, as the pass ``quantize_collectives`` decided on it.

    Attributes:
        name: dotted path of the module that it comes from and the name of its node.
        kind: ``"all_reduce"``, ``"reduce_scatter"`` or ``"all_gather"``.
        group: name of its process group.
        ranks: size of the group; None where the group is not known.
        shape: of the whole tensor as text, symbols included: the input of an all-reduce or a reduce-scatter, the output of
            an all-gather.
        dtype: of the tensor.
        nbytes: of the whole tensor; None where it depends on a symbol.
        wire: the wire format that was asked for; with ``"auto"`` the form that was chosen (``"one_shot"``, ``"two_shot"``, a wire
            format or ``"plain"``), or ``"auto"`` and what it allows where the size of each message chooses.
        threshold: from how many bytes on it is quantized; None where another reason came first.
        threshold_source: ``"option"``, or as in ``communication.link_cost.Threshold``.
        predicted_gain: time of the plain collective over that of the quantized one, from times measured on this link.
        reason: why it stays plain, as a member name of ``Reason``; None where it is quantized.
        explanation: the reason in words, with the mend.
        link: what joins the ranks: backend, device, ranks and hosts.
        graph: number of the graph, from 1.
        plan: the form by bytes, of an all-reduce with ``"auto"``.
    """

    name: str
    kind: str
    group: str
    ranks: Optional[int]
    shape: str
    dtype: str
    nbytes: Optional[int]
    wire: str
    threshold: Optional[int] = None
    threshold_source: str = ""
    predicted_gain: Optional[float] = None
    reason: Optional[str] = None
    explanation: str = ""
    link: str = ""
    graph: int = 0
    plan: str = ""

    @property
    def quantized(self) -> bool:
        """Whether it became another than the plain collective, or one that decides by the size of each message."""
        return self.reason is None

    @property
    def decision(self) -> str:
        """``int8``, ``one_shot``, ``int8 by size``, or the name of the reason."""
        if self.reason is not None:
            return self.reason
        return self.wire if self.nbytes is not None else f"{self.wire} by size"

    def __str__(self) -> str:
        size = f"{self.nbytes:,} bytes" if self.nbytes is not None else self.shape
        why = f" (from {self.threshold:,} bytes, {self.threshold_source})" if self.threshold is not None else ""
        return f"{self.name}: {self.kind} over {self.ranks} ranks, {size}: {self.decision}{why}"
