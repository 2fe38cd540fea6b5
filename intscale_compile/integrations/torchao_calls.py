"""Where a ``quantize_`` call of torchao can be seen whole: the functions of its module that it calls with the model.

``quantize_`` hands a handler one module at a time. The functions in between are private, so values are told by what they are,
never by the names that torchao gives them, and what is not recognized is passed on as it came.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Optional

from torch import nn
from torchao.quantization import FqnToConfig

from .registry import PrivateName

_ALONE = "quantize_ hands over one module at a time, without what intscale_compile.quantize promises for a whole model: call that"
WALK = PrivateName(  # (model, handler, filter_fn, prefix of names, device, (config,))
    "torchao.quantization.quant_api:_replace_with_custom_fn_if_matches_filter",
    "planning a quantize_ call whole",
    _ALONE,
)
TABLE = PrivateName(  # (module, its name, FqnToConfig), once for each module
    "torchao.quantization.quant_api:_fqn_to_config_handler", "planning a quantize_ call with FqnToConfig whole", _ALONE
)

# Runs a call of torchao with what was recognized: model, configuration, filter, and a place that lives as long as the call.
Scope = Callable[[nn.Module, Any, Any, Optional[dict]], AbstractContextManager]


def watch_quantize_calls(scope: Scope, config_class: type, handler: Callable) -> None:
    """Let every ``quantize_`` call with a ``config_class``, whose handler is ``handler``, or with a table of such run inside of
    ``scope``. Idempotent.
    """
    WALK.wrap(lambda original: _watch_walk(original, scope, config_class, handler))
    TABLE.wrap(lambda original: _watch_table(original, scope, config_class))


def _watch_walk(original: Callable, scope: Scope, config_class: type, handler: Callable) -> Callable:
    def walk(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        model = next((value for value in values if isinstance(value, nn.Module)), None)
        nested = any(isinstance(value, str) and value.endswith(".") for value in values)  # a prefix of names
        configs = [c for value in values if isinstance(value, tuple) for c in value if type(c) is config_class]
        filters = [v for v in values if callable(v) and v is not handler and not isinstance(v, nn.Module)]
        if model is None or nested or len(configs) != 1 or len(filters) != 1:
            return original(*args, **kwargs)
        with scope(model, configs[0], filters[0], None):
            return original(*args, **kwargs)

    return walk


def _watch_table(original: Callable, scope: Scope, config_class: type) -> Callable:
    def step(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        table = next((value for value in values if isinstance(value, FqnToConfig)), None)
        module = next((value for value in values if isinstance(value, nn.Module)), None)
        name = next((value for value in values if isinstance(value, str)), None)
        ours = table is not None and any(type(c) is config_class for c in table.fqn_to_config.values())
        call = sys._getframe(1).f_locals
        model = _root(call, module, name) if ours and module is not None and name is not None else None
        if model is None:
            return original(*args, **kwargs)
        with scope(model, table, None, call):
            return original(*args, **kwargs)

    return step


def _root(call: dict, module: nn.Module, name: str) -> Optional[nn.Module]:
    """The model among the local variables of a call: the module that has ``module`` under ``name``."""
    if not name:
        return module
    for value in list(call.values()):
        if isinstance(value, nn.Module) and value is not module:
            try:
                if value.get_submodule(name) is module:
                    return value
            except AttributeError:
                continue
    return None
