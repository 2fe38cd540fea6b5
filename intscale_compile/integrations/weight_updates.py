"""Being told that a module has loaded other weights: PyTorch has hooks for that of one module, none of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .registry import PrivateName

LOADING = PrivateName(
    "torch.nn:Module.load_state_dict",
    "noticing weights that are loaded under torch.inference_mode",
    "call intscale_compile.refresh(model) after such a load_state_dict",
    parameters=("state_dict", "strict", "assign"),
)


def after_load_state_dict(callback: Callable[[torch.nn.Module], None]) -> None:
    """Call ``callback(module)`` after each ``module.load_state_dict(...)`` from now on, also after one that fails.

    The first call of this function decides: a second one does nothing.
    """

    def told(load: Callable) -> Callable:
        def load_state_dict(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            try:
                return load(self, *args, **kwargs)
            finally:
                callback(self)

        return load_state_dict

    LOADING.wrap(told)
