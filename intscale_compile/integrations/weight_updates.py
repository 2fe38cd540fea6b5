"""Being told that a module has loaded other weights: PyTorch has hooks for that of one module, none of all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def after_load_state_dict(callback: Callable[[torch.nn.Module], None]) -> None:
    """Call ``callback(module)`` after each ``module.load_state_dict(...)`` from now on, also after one that fails."""
    load = torch.nn.Module.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, *args, **kwargs)
        finally:
            callback(self)

    torch.nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
