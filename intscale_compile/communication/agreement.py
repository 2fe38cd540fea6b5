"""Ranks that disagree about a quantized collective are told so, instead of exchanging messages of different forms.

Before the first collective of a kind (operation, wire format, elements, dtype) on a group, each rank writes what it is about to
do into the store of the group, and reads what the others wrote. Later calls of that kind cost a look into a set. Nothing runs
on the device, so CUDA graphs are captured without it: their warm-up has checked.
"""

from __future__ import annotations

import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CommunicationError


class _Checked:
    """What the ranks of one group have agreed on, and how many times they have compared."""

    def __init__(self) -> None:
        self.kinds: set[tuple[str, int, torch.dtype, str]] = set()
        self.rounds = 0


_checked: weakref.WeakKeyDictionary[dist.ProcessGroup, _Checked] = weakref.WeakKeyDictionary()


def agree(collective: str, x: Tensor, wire: str, group: dist.ProcessGroup) -> None:
    """Compare with the other ranks, the first time for this kind of collective.

    Raises:
        CommunicationError: a rank is about to do something else, or did not come within the timeout of the group.
    """
    state = _checked.get(group)
    if state is None:
        state = _checked[group] = _Checked()
    kind = (collective, x.numel(), x.dtype, wire)
    if kind in state.kinds or group.size() == 1 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    _, store = dist.distributed_c10d._world.pg_map.get(group, (None, None))
    if store is not None and dist.get_backend(group) != "fake":
        state.rounds += 1
        text = f"{collective} of {x.numel()} x {str(x.dtype).removeprefix('torch.')} as {wire}"
        _compare(text, store, state.rounds, _timeout(x, group), group)
    state.kinds.add(kind)


def _timeout(x: Tensor, group: dist.ProcessGroup) -> timedelta:
    """The timeout of the collectives of a group."""
    options = getattr(group._get_backend(x.device), "options", None)
    return getattr(options, "_timeout", None) or dist.distributed_c10d._get_default_timeout(dist.get_backend(group))


def _compare(kind: str, store: dist.Store, number: int, timeout: timedelta, group: dist.ProcessGroup) -> None:
    keys = [f"intscale/{number}/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], kind)
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise CommunicationError(
            f"rank {group.rank()} waits for a quantized {kind}; ranks {missing} of group {group.group_name!r} did not start "
            f"one within {timeout}: give every rank the same model, options and input shape."
        ) from error
    kinds = [store.get(key).decode() for key in keys]
    if len(set(kinds)) > 1:
        said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(kinds))
        raise CommunicationError(
            f"the ranks of group {group.group_name!r} disagree about a quantized collective ({said}): give every rank the same "
            "model, options and input shape."
        )
