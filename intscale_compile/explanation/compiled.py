"""Mode and options of a module that ``torch.compile`` returned."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from torch import nn


class CompiledWith(NamedTuple):
    """What ``torch.compile`` was called with; all None for a module that it did not return."""

    mode: Optional[str]
    options: Optional[dict]
    dynamic: Optional[bool]


def compiled_with(model: nn.Module) -> CompiledWith:
    """Read them from a module that was compiled with our backend.

    Another backend's mode and options say nothing about what ours does. torch keeps them in attributes of its own, here
    as they are in 2.11 to 2.13.
    """
    context: Any = getattr(model, "dynamo_ctx", None)
    wrapper = getattr(context, "callback", None)
    while wrapper is not None and not hasattr(wrapper, "kwargs"):
        inner = getattr(wrapper, "_torchdynamo_orig_backend", None)
        wrapper = inner or getattr(wrapper, "_torchdynamo_orig_callable", None)
    dynamic = getattr(context, "_dynamic", None)
    if wrapper is None or getattr(wrapper, "compiler_name", "") != "intscale":
        return CompiledWith(None, None, dynamic)
    return CompiledWith(wrapper.kwargs.get("mode"), wrapper.kwargs.get("options"), dynamic)
