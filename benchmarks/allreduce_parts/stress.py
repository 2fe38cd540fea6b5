"""Many collectives in a row with random sizes, dtypes and wire formats, each compared with the reference, bit for bit.

Every rank can make the inputs of all ranks. In turn one of them computes what all must receive
(``reference.simulate_all_reduce``), in eager operators, which take far longer than the call, and broadcasts it. On a GPU the
mismatches are counted there: the host does not wait for a call.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import largest
from torch import Tensor

from intscale_compile import communication
from intscale_compile.communication import reference, symmetric, transport
from intscale_compile.communication.link_table import LOSSLESS, ONE_SHOT, TWO_SHOT
from intscale_compile.communication.message import WireFormat

DTYPES = ("bfloat16", "float16", "float32")
MOST_BYTES = {"cuda": 1 << 23, "cpu": 1 << 17}
FUSED_SHARE = 0.7  # of the calls, where it is possible
BAD_SHARE = 0.03  # of the calls have NaN or Inf somewhere on one rank
MOST_RANKS = 64
SYNCHRONIZE = 100  # calls


@dataclass
class Outcome:
    """What became of the calls.

    Attributes:
        calls: how many there were.
        wrong: how many gave a wrong result on some rank.
        by: how many went which way.
        bytes: of all messages before quantization.
        seconds: for all.
    """

    calls: int = 0
    wrong: int = 0
    by: Counter = field(default_factory=Counter)
    bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        ways = ", ".join(f"{count} {way}" for way, count in sorted(self.by.items()))
        return (
            f"stress: {self.calls} collectives ({ways}), {self.bytes / 1e9:.2f} GB, {self.seconds:.1f} s: "
            f"{self.wrong} wrong results"
        )


@dataclass(frozen=True)
class Case:
    """One call; the same on every rank."""

    number: int
    elements: int
    dtype: torch.dtype
    wire: WireFormat
    scale: float
    bad: float  # 0, or the NaN or Inf to put in

    def given(self, rank: int, device: torch.device) -> Tensor:
        """What a rank puts in; at an aligned address in every other call."""
        generator = torch.Generator(device).manual_seed(self.number * MOST_RANKS + rank)
        values = torch.randn(self.elements, generator=generator, device=device) * self.scale
        if self.bad and rank == self.number % dist.get_world_size():
            values[self.number % self.elements] = self.bad
        room = torch.empty(self.elements + 8, dtype=self.dtype, device=device)
        shift = self.elements * rank % 8 if self.number % 2 else 0
        return room[shift : shift + self.elements].copy_(values)

    def wanted(self, inputs: list[Tensor], way: str) -> Tensor:
        """The reference of what every rank gets."""
        if way in LOSSLESS:
            return reference.simulate_lossless_all_reduce(inputs)
        return all_at_once(torch.stack(inputs), self.wire)


def all_at_once(inputs: Tensor, wire: WireFormat) -> Tensor:
    """``reference.simulate_all_reduce`` of ``[ranks, elements]`` with all messages quantized by the same few operators."""
    ranks, elements = inputs.shape
    length = wire.slice_elements(elements, ranks)
    shape = (ranks, length // wire.group_size, wire.group_size)
    valid = (torch.arange(ranks * length, device=inputs.device) < elements).view(shape)
    values = F.pad(inputs.float(), (0, ranks * length - elements)).view(ranks, *shape)
    sent = _sent(values, valid.expand_as(values), wire)
    total = torch.zeros(shape, device=inputs.device)
    own = torch.arange(ranks, device=inputs.device).view(-1, 1, 1)
    for rank in range(ranks):
        total = total + torch.where(own == rank, values[rank], sent[rank])
    return _sent(total, valid, wire).flatten()[:elements].to(inputs.dtype)


def _sent(values: Tensor, valid: Tensor, wire: WireFormat) -> Tensor:
    """fp32 groups ``[..., g]`` as those who receive their message decode them."""
    flat, layout = values.flatten(0, -2), wire.layout(1)
    codes, scale, minimum, spike, position = reference.quantize_groups(
        flat, valid.flatten(0, -2), layout.bits, layout.spikes
    )
    found = minimum.float().unsqueeze(-1) + codes.float() * scale.float().unsqueeze(-1)
    for k in range(2 if layout.spikes else 0):
        found.scatter_(1, position[:, k : k + 1].long(), spike[:, k : k + 1].float())
    return found.view_as(values)


def draw(source: random.Random, number: int, wires: Sequence[WireFormat], dtypes: Sequence[str], most: int) -> Case:
    """A random call; small and large messages are as likely."""
    wire, dtype = source.choice(wires), getattr(torch, source.choice(dtypes))
    least = wire.group_size
    elements = int(math.exp(source.uniform(math.log(least), math.log(max(least + 1, most // dtype.itemsize)))))
    bad = source.choice((math.nan, math.inf, -math.inf)) if source.random() < BAD_SHARE else 0.0
    return Case(number, elements, dtype, wire, 10.0 ** source.uniform(-3, 3), bad)


def differs(out: Tensor, wanted: Tensor) -> Tensor:
    """bool scalar: whether any element has other bits; all NaN are alike."""
    integer = {2: torch.int16, 4: torch.int32}[out.element_size()]
    return ((out.view(integer) != wanted.view(integer)) & ~(out.isnan() & wanted.isnan())).any()


def run(
    calls: int,
    wires: Sequence[str],
    dtypes: Sequence[str],
    most: int | None,
    seed: int,
    link: str,
    device: torch.device,
    seconds: float | None = None,
) -> Outcome:
    """Run so many collectives on the default group, or as many as go into ``seconds``; the outcome is the same on every rank."""
    source, group = random.Random(seed), dist.group.WORLD
    parsed = [WireFormat.parse(wire) for wire in wires]
    most = most or MOST_BYTES[device.type]
    ways = _ways(device, link)
    if "fused" in ways:  # the largest message first, as a workspace grows
        symmetric.all_reduce(
            torch.zeros(most // 2, dtype=torch.bfloat16, device=device), WireFormat.parse("int8"), group
        )
    outcome, start = Outcome(calls), time.monotonic()
    wrong = torch.zeros(calls, dtype=torch.int32, device=device)
    for number in range(calls):
        case = draw(source, seed * calls + number, parsed, dtypes, most)
        way = next(iter(ways))
        if "fused" in ways and source.random() < FUSED_SHARE:
            lossless = case.dtype.itemsize == 2 and case.elements % 2 == 0
            way = source.choice(["fused", *LOSSLESS] if lossless else ["fused"])
        out = ways[way](case.given(group.rank(), device), case.wire)
        judge = number % group.size()
        wanted = torch.empty_like(out)
        if judge == group.rank():
            wanted.copy_(case.wanted([case.given(r, device) for r in range(group.size())], way))
        dist.broadcast(wanted, judge)
        wrong[number] = differs(out, wanted)
        outcome.by[way] += 1
        outcome.bytes += case.elements * case.dtype.itemsize
        if number % SYNCHRONIZE == SYNCHRONIZE - 1:
            if seconds is not None and largest(time.monotonic() - start, device) > seconds:
                outcome.calls = number + 1
                break
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number % (10 * SYNCHRONIZE) == 10 * SYNCHRONIZE - 1 and group.rank() == 0:
                print(f"stress: {number + 1} calls, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    dist.all_reduce(wrong, dist.ReduceOp.MAX)
    outcome.wrong, outcome.seconds = int(wrong.sum()), time.monotonic() - start
    return outcome


def _ways(device: torch.device, link: str) -> dict[str, Callable[[Tensor, WireFormat], Tensor]]:
    """How a call can go. On a CPU through the operator, which compares the ranks' arguments, on a GPU straight to the kernels."""
    group = dist.group.WORLD
    if device.type == "cpu":
        return {"operator": lambda x, wire: communication.all_reduce(x, str(wire))}
    ways = {"group": lambda x, wire: transport.all_reduce(x, wire, group)}
    if link == "nvlink" and symmetric.usable(group, device):
        ways["fused"] = lambda x, wire: symmetric.all_reduce(x, wire, group)
        ways[ONE_SHOT] = lambda x, wire: symmetric.one_shot(x, group)
        ways[TWO_SHOT] = lambda x, wire: symmetric.two_shot(x, group)
    return ways
