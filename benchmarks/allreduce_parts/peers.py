"""The all-reduces that are compared. Each has copies of its input, so that calls in a row work on different memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from intscale_compile.communication import symmetric, transport
from intscale_compile.communication.choice import Allowed, Plan, plan
from intscale_compile.communication.link_table import link_of, times_of
from intscale_compile.communication.message import WireFormat

PLAIN, TWO_SHOT, FUSED = "plain", "two_shot", " fused"
TORCH_ONE_SHOT, OUR_ONE_SHOT, OUR_TWO_SHOT = "torch_one_shot", "one_shot fp32", "two_shot fp32"
AUTO = "auto"
MOST_OUR_ONE_SHOT = 1 << 20
MOST_ONE_SHOT = 8 << 20  # bytes; every rank sends all of it to every other
SYMMETRIC = (TWO_SHOT, TORCH_ONE_SHOT, OUR_ONE_SHOT, OUR_TWO_SHOT)
COPY_BYTES = 1 << 30  # of all copies of an input
MOST_COPIES = {"cuda": 16, "cpu": 1}


class Unavailable(Exception):
    """A peer that this machine or link does not offer."""


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of an input of ``nbytes`` there are."""
    return max(1, min(MOST_COPIES[device.type], COPY_BYTES // nbytes))


class Peer:
    """One all-reduce of bf16.

    Attributes:
        name: short.
        xs: ``[copies, elements]``, what the calls read, and plain ones overwrite.
    """

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        self.xs = torch.empty(0)

    def take(self, sources: Tensor) -> None:
        """Make room for inputs like ``sources``."""
        self.xs = torch.empty_like(sources)

    def restore(self, sources: Tensor) -> None:
        """Give every copy its input back."""
        self.xs.copy_(sources)

    def call(self, copy: int) -> Tensor:
        """Sum one copy over the ranks."""
        raise NotImplementedError


class Plain(Peer):
    """The backend's all-reduce, in place as Inductor calls it."""

    def call(self, copy: int) -> Tensor:
        """Sum one copy over the ranks."""
        dist.all_reduce(self.xs[copy])
        return self.xs[copy]


class TwoShot(Peer):
    """PyTorch's two-shot all-reduce on symmetric memory, in place; its input is made there, so nothing is copied."""

    def __init__(self, name: str, device: torch.device, most_bytes: int):
        super().__init__(name, device)
        import torch.distributed._symmetric_memory as symmetric_memory

        if not hasattr(torch.ops.symm_mem, "two_shot_all_reduce_"):
            raise Unavailable("this PyTorch has no two-shot all-reduce on symmetric memory")
        self.buffer = symmetric_memory.empty(most_bytes // 2, dtype=torch.bfloat16, device=device)
        self.handle = symmetric_memory.rendezvous(self.buffer, dist.group.WORLD)

    def take(self, sources: Tensor) -> None:
        """Use the front of the buffer."""
        self.xs = self.buffer[: sources.numel()].view_as(sources)

    def call(self, copy: int) -> Tensor:
        """Sum one copy over the ranks."""
        return torch.ops.symm_mem.two_shot_all_reduce_(self.xs[copy], "sum", dist.group.WORLD.group_name)


def check_one_shot(x: Tensor) -> None:
    """Raise ``Unavailable`` for what is too large to be sent whole to every rank."""
    if x.nbytes > MOST_ONE_SHOT:
        raise Unavailable(f"messages above {MOST_ONE_SHOT >> 20} MB are not sent in one step")


class TorchOneShot(TwoShot):
    """PyTorch's one-shot all-reduce on symmetric memory: every rank reads and sums everything; out of place."""

    def call(self, copy: int) -> Tensor:
        """Sum one copy over the ranks."""
        check_one_shot(self.xs[copy])
        return torch.ops.symm_mem.one_shot_all_reduce(self.xs[copy], "sum", dist.group.WORLD.group_name)


class Lossless(Peer):
    """Ours on symmetric memory: bf16 in, summed in fp32 in rank order, rounded once."""

    def call(self, copy: int) -> Tensor:
        """Sum one copy over the ranks."""
        if self.name == OUR_ONE_SHOT and self.xs[copy].nbytes > MOST_OUR_ONE_SHOT:
            raise Unavailable("larger messages go in two steps")
        kernel = symmetric.one_shot if self.name == OUR_ONE_SHOT else symmetric.two_shot
        out = kernel(self.xs[copy], dist.group.WORLD)
        if out is None:
            raise Unavailable("symmetric memory is not used between these ranks")
        return out


class Auto(Peer):
    """What a compiled model calls with ``"auto"`` or ``"auto+FORMAT"``."""

    def __init__(self, name: str, device: torch.device):
        super().__init__(name, device)
        link = link_of(dist.group.WORLD, device)
        self.plan: Plan = plan(link, times_of(link), Allowed.parse(name))

    def call(self, copy: int) -> Tensor:
        """Sum one copy over the ranks."""
        x, group = self.xs[copy], dist.group.WORLD
        form = self.plan.form(x.nbytes)
        if form == PLAIN:
            dist.all_reduce(x)
            return x
        if form == "one_shot":
            out = symmetric.one_shot(x, group)
        else:
            out = (
                symmetric.two_shot(x, group)
                if form == "two_shot"
                else symmetric.all_reduce(x, WireFormat.parse(form), group)
            )
        if out is None:
            raise Unavailable("symmetric memory is not used between these ranks")
        return out


class Quantized(Peer):
    """Ours through the process group."""

    def __init__(self, name: str, device: torch.device):
        super().__init__(name, device)
        self.wire = WireFormat.parse(name.removesuffix(FUSED))

    def call(self, copy: int) -> Tensor:
        """Sum one copy over the ranks."""
        return transport.all_reduce(self.xs[copy], self.wire, dist.group.WORLD)


class Fused(Quantized):
    """Ours in one kernel on symmetric memory."""

    def call(self, copy: int) -> Tensor:
        """Sum one copy over the ranks."""
        out = symmetric.all_reduce(self.xs[copy], self.wire, dist.group.WORLD)
        if out is None:
            raise Unavailable("symmetric memory is not used between these ranks")
        return out


def names(wires: Sequence[str], device: torch.device) -> list[str]:
    """All peers of a device, in the order of the table."""
    on_gpu = device.type == "cuda"
    return [
        PLAIN,
        *((*SYMMETRIC, AUTO) if on_gpu else ()),
        *wires,
        *([wire + FUSED for wire in wires] if on_gpu else []),
    ]


def make(name: str, device: torch.device, link: str, most_bytes: int) -> Peer:
    """A peer by its name.

    Args:
        most_bytes: of all copies of an input, at the largest size.

    Raises:
        Unavailable: it cannot run here.
    """
    if name == PLAIN:
        return Plain(name, device)
    if name not in SYMMETRIC and not name.endswith(FUSED) and not name.startswith(AUTO):
        return Quantized(name, device)
    if link != "nvlink":
        raise Unavailable(f"symmetric memory is NVLink, and the link is {link}")
    if name.startswith(AUTO):
        return Auto(name, device)
    if name in (TWO_SHOT, TORCH_ONE_SHOT):
        return (TwoShot if name == TWO_SHOT else TorchOneShot)(name, device, most_bytes)
    return Lossless(name, device) if name in SYMMETRIC else Fused(name, device)
