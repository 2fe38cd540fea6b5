"""What PyTorch's eager mode is doing at the moment, asked where a microsecond counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_functorch = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing
# A build of PyTorch without CUDA has neither, and no tensor that they are asked for.
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device by its index: the handle of its stream
current_device = getattr(torch._C, "_cuda_getDevice", None)  # its index


def nobody_watches() -> bool:
    """Whether no mode (fake tensors, counting, tracing) and no transform (vmap, grad) wants to see each operator."""
    return not _modes() and _functorch() is None and not _tracing()


def is_plain(x: Any) -> bool:
    """Whether ``x`` is a tensor and of no subclass."""
    return type(x) in _PLAIN_TYPES


def gpu_index(x: Tensor) -> int:
    """Index of the CUDA device that ``x`` is on, -1 on any other."""
    return x.get_device() if x.is_cuda else -1


def differentiates() -> bool:
    """Whether a transform of torch.func that differentiates (grad, vjp, jvp and what is made of them) is under way."""
    if _functorch() is None:
        return False
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() in (kinds.Grad, kinds.Jvp) for interpreter in stack)
