"""``intscale::planned_all_reduce``: an all-reduce whose form follows from its size, by a plan that is part of the graph."""

from __future__ import annotations

import logging
from typing import Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..reasons import log_once
from . import symmetric
from .agreement import agree
from .choice import Allowed, Plan, plan
from .link_table import LOSSLESS, ONE_SHOT, PLAIN, link_of, times_of
from .ops import ALL_REDUCE_OP, FLOAT_DTYPES, group_or_default, no_gradient, resolve

torch.library.define("intscale::planned_all_reduce", "(Tensor x, str steps, str group_name) -> Tensor")
PLANNED_ALL_REDUCE = torch.ops.intscale.planned_all_reduce.default


@torch.library.impl("intscale::planned_all_reduce", "CompositeExplicitAutograd")
def _all_reduce(x: Tensor, steps: str, group_name: str) -> Tensor:
    group = resolve(group_name)
    form = Plan.parse(steps).form(x.nbytes)
    if form != PLAIN and form not in LOSSLESS and x.dtype in FLOAT_DTYPES:
        return ALL_REDUCE_OP(x, form, group_name)
    flat = x.detach().contiguous().view(-1)
    out = _lossless(flat, form, group) if form in LOSSLESS else None
    if out is None:
        out = flat.clone()
        if group.size() > 1 and x.numel():
            dist.all_reduce(out, group=group)
    return out.view(x.shape)


def _lossless(x: Tensor, form: str, group: dist.ProcessGroup) -> Optional[Tensor]:
    """The sum on symmetric memory; None, said once, where that is not possible. The same answer on every rank."""
    agree("all_reduce", x, form, group)
    if reason := reason_against(x, group):
        log_once(
            logging.INFO, f"all_reduce ({form}) of group {group.group_name!r}: the plain collective is used: {reason}"
        )
        return None
    out = (symmetric.one_shot if form == ONE_SHOT else symmetric.two_shot)(x, group)
    if out is None:
        log_once(logging.INFO, f"all_reduce ({form}): symmetric memory is not used between these ranks")
    return out


def reason_against(x: Tensor, group: dist.ProcessGroup) -> Optional[str]:
    """Why no rank can sum ``x`` on symmetric memory, whatever joins them."""
    if not x.is_cuda:
        return f"symmetric memory is memory of GPUs, and the tensor is on {x.device.type}"
    if x.dtype not in symmetric.LOSSLESS_DTYPES:
        return f"the kernels take bf16 and fp16, not {str(x.dtype).removeprefix('torch.')}"
    if group.size() == 1 or not x.numel():
        return "there is nothing to send"
    return None


@torch.library.register_fake("intscale::planned_all_reduce")
def _all_reduce_fake(x: Tensor, steps: str, group_name: str) -> Tensor:
    return x.new_empty(x.shape)


torch.library.register_autograd("intscale::planned_all_reduce", no_gradient)


def all_reduce(x: Tensor, wire: str, group: Optional[Union[dist.ProcessGroup, str]] = None) -> Tensor:
    """Sum of ``x`` over the ranks of a group, lossless or through quantized messages (two-step all-reduce, arXiv 2412.04964).

    Every rank gets the same bits. In quantized messages NaN and Inf stay visible: their group of elements becomes NaN on every
    rank.

    Args:
        x: fp32, bf16 or fp16, any shape, the same on every rank.
        wire: name of a wire format, as ``"int8"`` (see :meth:`WireFormat.parse`); ``"auto"``: the fastest lossless form for this
            size on this link, in CUDA graphs; ``"auto+int8"``: that, or the wire format where it is faster.
        group: process group or its name; the default group if None.

    Returns:
        a new contiguous tensor of the shape and dtype of ``x``.

    Raises:
        InputError: another dtype. ConfigError: not a wire format. CommunicationError: no such group, or the ranks disagree.
    """
    found, allowed = group_or_default(group), Allowed.parse(wire)
    if not allowed.lossless:
        return ALL_REDUCE_OP(x, str(allowed), found.group_name)
    link = link_of(found, x.device)
    kinds = Allowed(reason_against(x, found) is None, allowed.wire)
    return PLANNED_ALL_REDUCE(x, str(plan(link, times_of(link), kinds)), found.group_name)
