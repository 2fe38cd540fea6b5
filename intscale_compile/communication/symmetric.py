"""All-reduce over NVLink: one kernel on symmetric memory (``torch.distributed._symmetric_memory``), no multicast.

Quantized (8 bits in ``code_words``, the rest in ``fused_kernel``), or lossless: small messages in one step, larger ones in two
(``word_kernels``; above 64 MB ``fused_kernel``).

Used where all ranks of a group are GPUs of one host that can map each other's memory; every rank must come to the same answer,
so they vote, once per group. Everything else goes through the process group.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..reasons import log_once
from .message import Elements, WireFormat

if TYPE_CHECKING:
    from .code_words import CodeForm
    from .word_kernels import Form

VARIABLE = "INTSCALE_SYMMETRIC_MEMORY"  # 0: never
LEAST_WORKSPACE = 1 << 20


@dataclass
class Workspace:
    """Memory that all ranks of a group map.

    Attributes:
        buffer: uint8, this rank's part.
        peers: int64 ``[ranks]`` on the device: how far every rank's part, as this rank maps it, lies behind its own.
        counts: int32 on the device: how often each program has raised its flags.
        handle: keeps the mapping alive.
        stream: of the last launch. Launches must not overlap.
    """

    buffer: Tensor
    peers: Tensor
    counts: Tensor
    handle: Any
    stream: Optional[torch.cuda.Stream] = None


@dataclass
class _Member:
    usable: bool
    spaces: list[Workspace]  # the largest is the last; captured graphs hold on to earlier ones
    # Of kernels whose workspace does not depend on the message.
    fixed: dict[Union[Form, CodeForm], Workspace] = field(default_factory=dict)


_members: weakref.WeakKeyDictionary[dist.ProcessGroup, _Member] = weakref.WeakKeyDictionary()


LOSSLESS_DTYPES = (torch.bfloat16, torch.float16)
MOST_IN_WORDS = 64 << 20  # bytes; larger messages take the kernel of the quantized form
IN_CODE_WORDS = WireFormat(8)
MOST_RANKS_IN_CODE_WORDS = 8  # the kernel for 16 compiles for 40 s and spills 248 bytes a thread


def two_shot(x: Tensor, group: dist.ProcessGroup) -> Optional[Tensor]:
    """Lossless sum of the 1-D ``x``, bf16 or fp16: fp32 in rank order, rounded once; None: not possible here."""
    # Imports Triton, which only GPUs need.
    from . import word_kernels

    if x.dtype not in LOSSLESS_DTYPES:
        return None
    if x.numel() % 2 == 0 and x.nbytes <= MOST_IN_WORDS:
        out = _in_words(x, word_kernels.two_shot(group.size()), group)
        if out is not None:
            return out
    return all_reduce(x, Elements(), group)


def one_shot(x: Tensor, group: dist.ProcessGroup) -> Optional[Tensor]:
    """The bits of :func:`two_shot` in one step where the message is small enough, and else that; None: not possible here."""
    # Imports Triton, which only GPUs need.
    from . import word_kernels

    if x.dtype not in LOSSLESS_DTYPES:
        return None
    out = None
    if x.numel() % 2 == 0 and x.numel() <= word_kernels.ONE_SHOT.elements:
        out = _in_words(x, word_kernels.ONE_SHOT, group)
    return two_shot(x, group) if out is None else out


def _in_words(x: Tensor, form: Form, group: dist.ProcessGroup) -> Optional[Tensor]:
    """The sum of an even number of elements through the kernels of ``word_kernels``; None: not possible here."""
    # Imports Triton, which only GPUs need.
    from . import word_kernels as words

    rank, ranks = group.rank(), group.size()
    space = fixed_workspace(group, x.device, form, form.workspace_bytes(ranks), form.programs, words.FILL)
    if space is None:
        return None
    if x.data_ptr() % 4:  # never an answer that differs among ranks
        x = x.clone()
    out = torch.empty_like(x)
    kernel = words.one_shot_kernel if form.legs == 1 else words.two_shot_kernel
    with torch.cuda.device(x.device):
        follow(space)
        for begin in range(0, x.numel(), form.elements):
            part, sums = x[begin : begin + form.elements], out[begin : begin + form.elements]
            lengths = () if form.legs == 1 else (form.slice_words(part.numel()),)
            kernel[(form.launched(part.numel()),)](
                part, sums, space.buffer, space.peers, space.counts, part.numel() // 2, *lengths, LEGS=form.legs,
                RANK=rank, RANKS=ranks, WORDS=words.WORDS, PROGRAMS=form.programs, num_warps=words.WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _in_code_words(x: Tensor, group: dist.ProcessGroup) -> Optional[Tensor]:
    """The quantized sum with 8 bits through the kernel of ``code_words``; None: not possible here."""
    # Imports Triton, which only GPUs need.
    from . import code_words as codes
    from .word_kernels import FILL

    ranks = group.size()
    form = codes.code_form(x.numel(), ranks)
    space = fixed_workspace(group, x.device, form, form.workspace_bytes, form.programs, FILL)
    if space is None:
        return None
    out = torch.empty_like(x)
    length = IN_CODE_WORDS.slice_elements(x.numel(), ranks)
    groups = length // IN_CODE_WORDS.group_size
    with torch.cuda.device(x.device):
        follow(space)
        for begin in range(0, groups, form.groups):
            codes.code_words_kernel[(form.launched(groups - begin),)](
                x, out, space.buffer, space.peers, space.counts, x.numel(), length, groups, begin,
                form.programs, RANK=group.rank(), RANKS=ranks, GROUPS=codes.GROUPS, num_warps=codes.WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def all_reduce(x: Tensor, wire: Union[WireFormat, Elements], group: dist.ProcessGroup) -> Optional[Tensor]:
    """Sum of the 1-D ``x`` over the ranks, the same bits on each and as through the process group; None: not possible here."""
    # Imports Triton, which only GPUs need.
    from .fused_kernel import MOST_PROGRAMS, fused_all_reduce_kernel, gather_slots

    ranks = group.size()
    if wire == IN_CODE_WORDS and ranks <= MOST_RANKS_IN_CODE_WORDS:
        return _in_code_words(x, group)
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    sizes, constants, programs, needed = _plan(x.numel(), wire, ranks, multiprocessors)
    space = _workspace(group, x.device, needed)
    if space is None:
        return None
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        follow(space)
        fused_all_reduce_kernel[(programs,)](
            x, out, space.buffer, space.peers, space.counts, *sizes, gather_slots(ranks, space.buffer.numel()),
            RANK=group.rank(), RANKS=ranks, PROGRAMS=MOST_PROGRAMS, **constants,
        )  # fmt: skip
    return out


@functools.lru_cache(maxsize=256)
def _plan(
    elements: int, wire: Union[WireFormat, Elements], ranks: int, multiprocessors: int
) -> tuple[tuple[int, ...], dict, int, int]:
    """Of a launch: sizes, from ``elements`` to ``out_nbytes``; constants and options; programs; bytes of the workspace."""
    # Imports Triton, which only GPUs need.
    from .fused_kernel import schedule, workspace_bytes

    length = wire.slice_elements(elements, ranks)
    groups = length // wire.group_size
    layout = wire.layout(groups)
    plan = schedule(length, multiprocessors, ranks, layout.bits)
    sizes = (elements, length, groups, plan.per_round, layout.nbytes, layout.nbytes)
    constants = {**plan.constants(layout), "OUT_BITS": layout.bits}
    return sizes, constants, plan.programs, workspace_bytes(ranks, layout, layout)


def follow(space: Workspace) -> None:
    """Let the current stream wait for the last launch on another one; in a captured graph the graph's own order holds."""
    stream = torch.cuda.current_stream()
    if torch.cuda.is_current_stream_capturing():
        return
    if space.stream is not None and space.stream != stream:
        stream.wait_stream(space.stream)
    space.stream = stream


def usable(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether this group's all-reduce can run as one kernel. The first call of a group is a collective."""
    member = _members.get(group)
    if member is None:
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return False
        member = _members[group] = _Member(_vote(group, device), [])
    return member.usable


def _vote(group: dist.ProcessGroup, device: torch.device) -> bool:
    """The common answer of all ranks."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
    mine = (socket.gethostname(), _boot(), device.index, _reason_against(group, device), multiprocessors)
    answers: list[Any] = [None] * group.size()
    dist.all_gather_object(answers, mine, group=group)
    against = next((answer[3] for answer in answers if answer[3]), None)
    if against is None and len({answer[:2] for answer in answers}) > 1:
        against = "its ranks are on several hosts"
    if against is None and len({answer[4] for answer in answers}) > 1:
        against = "its GPUs have different numbers of multiprocessors"  # all ranks must divide a message alike
    blind = [a[2] for a in answers if a[2] != device.index and not torch.cuda.can_device_access_peer(device, a[2])]
    dist.all_gather_object(
        answers, against or (f"GPU {device.index} cannot map GPU {blind[0]}" if blind else None), group
    )
    against = next((answer for answer in answers if answer), None)
    if against:
        log_once(logging.INFO, f"group {group.group_name!r}: messages go through the process group: {against}")
    return against is None


def _reason_against(group: dist.ProcessGroup, device: torch.device) -> Optional[str]:
    # Imports Triton, which only GPUs need.
    from .fused_kernel import MOST_RANKS

    if group.size() > MOST_RANKS:
        return f"the kernels on symmetric memory take at most {MOST_RANKS} ranks"
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "NCCL_P2P_DISABLE=1"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (7, 0):
        return "symmetric memory needs an NVIDIA GPU of compute capability 7.0 or higher"
    return None


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _workspace(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> Optional[Workspace]:
    """A workspace of at least ``nbytes``; making one is a collective, which all ranks reach with the same size."""
    # Imports Triton, which only GPUs need.
    from .fused_kernel import MOST_PROGRAMS

    if not usable(group, device):
        return None
    spaces = _members[group].spaces
    if not spaces or spaces[-1].buffer.numel() < nbytes:
        if torch.cuda.is_current_stream_capturing():
            log_once(
                logging.INFO, "a graph is captured before its largest message was sent once: it goes through the group"
            )
            return None
        size = max(LEAST_WORKSPACE, 1 << (nbytes - 1).bit_length())
        # Another thread and its stream: a warm-up of CUDA graphs takes what this one allocates for part of its graph.
        with ThreadPoolExecutor(1) as thread:
            spaces.append(thread.submit(_make, group, device, size, MOST_PROGRAMS).result())
    return spaces[-1]


def fixed_workspace(
    group: dist.ProcessGroup, device: torch.device, form: Union[Form, CodeForm], nbytes: int, programs: int, fill: int
) -> Optional[Workspace]:
    """The workspace of a form for which one size serves all messages, made at its first call, which is a collective.

    ``fill``: its bytes at first.
    """
    if not usable(group, device):
        return None
    made = _members[group].fixed
    if form not in made:
        if torch.cuda.is_current_stream_capturing():
            log_once(logging.INFO, "a graph is captured before a message was sent once: it goes through the group")
            return None
        with ThreadPoolExecutor(1) as thread:
            made[form] = thread.submit(_make, group, device, nbytes, programs, fill).result()
    return made[form]


def _make(group: dist.ProcessGroup, device: torch.device, nbytes: int, programs: int, fill: int = 0) -> Workspace:
    # Slow to import.
    import torch.distributed._symmetric_memory as symmetric_memory

    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        buffer = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(buffer, group)
        buffer.fill_(fill)
        counts = torch.zeros(programs, dtype=torch.int32, device=device)
        offsets = [pointer - buffer.data_ptr() for pointer in handle.buffer_ptrs]
        peers = torch.tensor(offsets, dtype=torch.int64, device=device)
        handle.barrier()  # no rank raises a flag before all flags are zero
        torch.cuda.current_stream(device).synchronize()
    return Workspace(buffer, peers, counts, handle)
