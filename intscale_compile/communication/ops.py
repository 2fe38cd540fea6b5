"""``intscale::quantized_all_reduce``, ``quantized_reduce_scatter`` and ``quantized_all_gather``: sums and copies over ranks
whose messages are quantized (Flash Communication, arXiv 2412.04964). They are synchronous: their result can be used at once.
"""

from __future__ import annotations

from typing import Any, Optional, Union, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CommunicationError, InputError, UnsupportedOpError
from . import symmetric, transport
from .agreement import agree
from .fallback import plain_reason
from .message import WireFormat

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

torch.library.define("intscale::quantized_all_reduce", "(Tensor x, str wire, str group_name) -> Tensor")
torch.library.define("intscale::quantized_reduce_scatter", "(Tensor x, str wire, int ranks, str group_name) -> Tensor")
torch.library.define("intscale::quantized_all_gather", "(Tensor x, str wire, int ranks, str group_name) -> Tensor")
ALL_REDUCE_OP = torch.ops.intscale.quantized_all_reduce.default
REDUCE_SCATTER_OP = torch.ops.intscale.quantized_reduce_scatter.default
ALL_GATHER_OP = torch.ops.intscale.quantized_all_gather.default


def check(x: Tensor, wire: str) -> WireFormat:
    """The format named ``wire``; ``InputError`` for a tensor that is not fp32, bf16 or fp16, ``ConfigError`` for a name."""
    if x.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"a quantized collective got {x.dtype}; it takes float32, bfloat16 or float16: use the plain collective of "
            "torch.distributed for other tensors."
        )
    return WireFormat.parse(wire)


def check_rows(x: Tensor, ranks: int) -> None:
    """Raise ``InputError`` unless dimension 0 of ``x`` can be cut into ``ranks`` equal parts."""
    if x.dim() == 0 or x.shape[0] % ranks:
        raise InputError(
            f"a quantized reduce-scatter over {ranks} ranks got a tensor of shape {list(x.shape)}: pad dimension 0 to a "
            f"multiple of {ranks}."
        )


def resolve(group_name: str, ranks: Optional[int] = None) -> dist.ProcessGroup:
    """The process group of a name; ``CommunicationError`` where there is none (any more), or it has not that many ranks."""
    try:
        group = dist.distributed_c10d._resolve_process_group(cast(Any, group_name))
    except (LookupError, RuntimeError, ValueError) as error:
        raise CommunicationError(
            f"there is no process group named {group_name!r} in this process: it was destroyed, or this rank is no member; "
            "call the model while its group is alive, and compile again for another group."
        ) from error
    if ranks is not None and group.size() != ranks:
        raise CommunicationError(
            f"ranks={ranks}, but the process group {group_name!r} has {group.size()}: compile again for this group."
        )
    return group


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1)


@torch.library.impl("intscale::quantized_all_reduce", "CompositeExplicitAutograd")
def _all_reduce(x: Tensor, wire: str, group_name: str) -> Tensor:
    parsed, group = check(x, wire), resolve(group_name)
    agree("all_reduce", x, wire, group)
    if plain_reason("all_reduce", x.numel(), parsed, group):
        out = x.detach().clone(memory_format=torch.contiguous_format)
        if group.size() > 1 and x.numel():
            dist.all_reduce(out, group=group)
        return out
    flat = _contiguous(x)
    fused = symmetric.all_reduce(flat, parsed, group) if x.is_cuda else None
    return (transport.all_reduce(flat, parsed, group) if fused is None else fused).view(x.shape)


@torch.library.impl("intscale::quantized_reduce_scatter", "CompositeExplicitAutograd")
def _reduce_scatter(x: Tensor, wire: str, ranks: int, group_name: str) -> Tensor:
    parsed, group = check(x, wire), resolve(group_name, ranks)
    check_rows(x, ranks)
    agree("reduce_scatter", x, wire, group)
    shape = (x.shape[0] // ranks, *x.shape[1:])
    flat, length = _contiguous(x), x.numel() // ranks
    if plain_reason("reduce_scatter", length, parsed, group):
        out = x.new_empty(shape)
        if group.size() > 1 and x.numel():
            transport.reduce_scatter_tensor(out.view(-1), flat, group=group)
        else:
            out.view(-1).copy_(flat)
        return out
    return transport.reduce_scatter(flat, length, parsed, group).view(shape)


@torch.library.impl("intscale::quantized_all_gather", "CompositeExplicitAutograd")
def _all_gather(x: Tensor, wire: str, ranks: int, group_name: str) -> Tensor:
    parsed, group = check(x, wire), resolve(group_name, ranks)
    agree("all_gather", x, wire, group)
    shape = (x.shape[0] * ranks, *x.shape[1:]) if x.dim() else (ranks,)
    if plain_reason("all_gather", x.numel(), parsed, group):
        out = x.new_empty(shape)
        if group.size() > 1 and x.numel():
            transport.all_gather_tensor(out.view(-1), _contiguous(x), group=group)
        else:
            out.view(-1).copy_(_contiguous(x))
        return out
    return transport.all_gather(_contiguous(x), parsed, group).view(shape)


@torch.library.register_fake("intscale::quantized_all_reduce")
def _all_reduce_fake(x: Tensor, wire: str, group_name: str) -> Tensor:
    check(x, wire)
    return x.new_empty(x.shape)


@torch.library.register_fake("intscale::quantized_reduce_scatter")
def _reduce_scatter_fake(x: Tensor, wire: str, ranks: int, group_name: str) -> Tensor:
    check(x, wire)
    check_rows(x, ranks)
    return x.new_empty((x.shape[0] // ranks, *x.shape[1:]))


@torch.library.register_fake("intscale::quantized_all_gather")
def _all_gather_fake(x: Tensor, wire: str, ranks: int, group_name: str) -> Tensor:
    check(x, wire)
    return x.new_empty((x.shape[0] * ranks, *x.shape[1:]) if x.dim() else (ranks,))


def no_gradient(ctx, grad):
    """What a gradient meets."""
    raise UnsupportedOpError(
        "quantized collectives have no gradient: train with the plain collectives (leave out the communication option)."
    )


for _name in ("quantized_all_reduce", "quantized_reduce_scatter", "quantized_all_gather"):
    torch.library.register_autograd(f"intscale::{_name}", no_gradient)


def group_or_default(group: Optional[Union[dist.ProcessGroup, str]]) -> dist.ProcessGroup:
    """The group of an argument; ``CommunicationError`` where there is none."""
    if isinstance(group, str):
        return resolve(group)
    if not dist.is_initialized():
        raise CommunicationError(
            "torch.distributed is not initialized: call torch.distributed.init_process_group first."
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):  # what new_group gives to outsiders
        raise CommunicationError(
            f"group={group!r} is no process group of this rank: call it on members of the group only."
        )
    return dist.distributed_c10d._get_default_group() if group is None else group


def reduce_scatter(x: Tensor, wire: str, group: Optional[Union[dist.ProcessGroup, str]] = None) -> Tensor:
    """This rank's part, along dimension 0, of the sum of ``x`` over the ranks, quantized; arguments as of ``all_reduce``."""
    resolved = group_or_default(group)
    return REDUCE_SCATTER_OP(x, str(wire), resolved.size(), resolved.group_name)


def all_gather(x: Tensor, wire: str, group: Optional[Union[dist.ProcessGroup, str]] = None) -> Tensor:
    """``x`` of every rank along dimension 0, each through a quantized message; arguments as of ``all_reduce``."""
    resolved = group_or_default(group)
    return ALL_GATHER_OP(x, str(wire), resolved.size(), resolved.group_name)
