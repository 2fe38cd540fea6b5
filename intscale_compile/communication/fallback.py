"""When a quantized collective leaves its message to the plain collective of torch.distributed."""

from __future__ import annotations

import logging
from typing import Optional

import torch.distributed as dist

from ..reasons import log_once
from .message import WireFormat


def plain_reason(collective: str, elements: int, wire: WireFormat, group: dist.ProcessGroup) -> Optional[str]:
    """Why ``elements`` are not quantized, logged once; None where they are."""
    if group.size() == 1:
        reason = f"the group {group.group_name!r} has one rank: there is nothing to send"
    elif elements == 0:
        return "the message is empty"
    elif elements < wire.group_size:
        reason = f"a message of {elements} elements is smaller than one group of {wire.group_size}: the plain collective is used"
    else:
        return None
    log_once(logging.INFO, f"quantized {collective} ({wire}): {reason}")
    return reason
