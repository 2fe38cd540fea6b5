"""The all-reduces that are compared. Each has copies of its input, so that calls in a row work on different memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from intscale_compile.communication import symmetric, transport
from intscale_compile.communication.message import WireFormat

PLAIN, TWO_SHOT, FUSED = "plain", "two_shot", " fused"
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
    return [PLAIN, *([TWO_SHOT] if on_gpu else []), *wires, *([wire + FUSED for wire in wires] if on_gpu else [])]


def make(name: str, device: torch.device, link: str, most_bytes: int) -> Peer:
    """A peer by its name.

    Args:
        most_bytes: of all copies of an input, at the largest size.

    Raises:
        Unavailable: it cannot run here.
    """
    if name == PLAIN:
        return Plain(name, device)
    if name != TWO_SHOT and not name.endswith(FUSED):
        return Quantized(name, device)
    if link != "nvlink":
        raise Unavailable(f"symmetric memory is NVLink, and the link is {link}")
    return TwoShot(name, device, most_bytes) if name == TWO_SHOT else Fused(name, device)
