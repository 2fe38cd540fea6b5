"""What PyTorch's eager mode is doing at the moment, asked where a microsecond counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_functorch = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing
_fw_grad = torch._C._is_fwd_grad_enabled
# A build of PyTorch without CUDA has neither, and no tensor that they are asked for.
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device by its index: the handle of its stream
current_device = getattr(torch._C, "_cuda_getDevice", None)  # its index


def nobody_watches() -> bool:
    """Whether no mode (fake tensors, counting, tracing) and no transform (vmap, grad, tangents) wants to see each operator."""
    return not _modes() and _functorch() is None and not _tracing() and not takes_tangents()


def is_traced() -> bool:
    """Whether torch.jit traces, as the older export to ONNX does too."""
    return _tracing()


def takes_tangents() -> bool:
    """Whether a level of ``torch.autograd.forward_ad`` is open: tensors may carry tangents, but within a custom function."""
    return _forward_ad._current_level >= 0 and _fw_grad()


def is_plain(x: Any) -> bool:
    """Whether ``x`` is a tensor and of no subclass."""
    return type(x) in _PLAIN_TYPES


def gpu_index(x: Tensor) -> int:
    """Index of the CUDA device that ``x`` is on, -1 on any other."""
    return x.get_device() if x.is_cuda else -1


def differentiates() -> bool:
    """Whether a transform of torch.func that differentiates (grad, vjp, jvp and what is made of them) is under way.

    Or a level of ``torch.autograd.forward_ad``, of which ``torch.library``'s gradients would lose the tangents.
    """
    if takes_tangents():
        return True
    if _functorch() is None:
        return False
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() in (kinds.Grad, kinds.Jvp) for interpreter in stack)
