"""What torchao's ``quantize_`` does with an ``IntScaleConfig``.

``quantize_`` hands over one module at a time and says neither its name nor which model it belongs to. Two promises need
the whole model: a failed call leaves the model as it was, and output embeddings are left alone. So the handler looks up
the ``quantize_`` call that it runs in, checks every weight of that call before it changes the first one, and remembers
the plan in that call's frame.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from torchao.quantization import FqnToConfig, quant_api
from torchao.quantization.transform_module import register_quantize_module_handler

from .config import IntScaleConfig
from .errors import IntScaleError, WeightError
from .format import ACTIVATION_MAX, CODE_MIN, INT32_MAX
from .integrations.torchao import is_linear
from .progress import Progress
from .reasons import Reason, log_once
from .tensors.expert_layers import expert_stacks
from .tensors.intscale_tensor import IntScaleTensor
from .tensors.selection import (
    LEFT_OUT,
    ROTATION,
    is_conv1d,
    left_alone_by_default,
    linear_extra_repr,
    linears_and_experts,
)
from .tensors.weight_checks import check_weight

PLAN_KEY = "__intscale_plan__"
_torchao_quantize_code = quant_api.quantize_.__code__


@dataclass
class _Plan:
    """One running ``quantize_`` call: the model, names of its modules, what is left alone, and how to undo."""

    names: dict[int, str]
    left_alone: dict[int, Reason]
    may_fail: bool = False  # whether a weight may still fail after others were changed: then originals are kept
    undo: list[Callable[[], Any]] = field(default_factory=list)
    progress: Progress = field(default_factory=lambda: Progress(0, 0))

    def restore(self) -> None:
        """Give every module of this call its original parameter back."""
        self.progress.close()
        while self.undo:
            self.undo.pop()()


def _current_plan() -> Optional[_Plan]:
    frame: Optional[types.FrameType] = sys._getframe(1)
    while frame is not None and frame.f_code is not _torchao_quantize_code:
        frame = frame.f_back
    if frame is None:
        return None
    call = frame.f_locals
    plan = call.get(PLAN_KEY)
    if plan is None:
        plan = _make_plan(call["model"], call["config"], call["filter_fn"])
        call[PLAN_KEY] = plan
    return plan


def _make_plan(model: nn.Module, config, filter_fn) -> _Plan:
    names = {id(module): name for name, module in model.named_modules()}
    plan = _Plan(names, {})
    by_name = isinstance(config, FqnToConfig)
    default = filter_fn in (None, is_linear) and not by_name
    if default or (filter_fn is linears_and_experts and not by_name):
        plan.left_alone = left_alone_by_default(model)
    if default:
        _warn_of_other_kinds(model)
    selected: dict[int, int] = {}  # bytes by id
    for name, module, weight, chosen in _weights_of_call(model, config, filter_fn):
        if id(module) not in plan.left_alone and not isinstance(weight, IntScaleTensor):
            _check_parameter(module, weight, name)
            selected[id(weight)] = weight.nbytes
            plan.may_fail |= _may_fail(weight, chosen)
    plan.progress = Progress(len(selected), sum(selected.values()))
    for module in model.modules():  # so that the backend does not quantize what this call leaves out
        other_kind = not default and (is_conv1d(module) or bool(expert_stacks(module)))
        for leaf in _leaves(module, "weight") if isinstance(module, nn.Linear) or other_kind else ():
            left = getattr(module, leaf)
            if id(left) not in selected and not _is_left_out(left):
                setattr(left, LEFT_OUT, True)
                plan.undo.append(functools.partial(delattr, left, LEFT_OUT))
    return plan


def _warn_of_other_kinds(model: nn.Module) -> None:
    """Say what torchao's default filter, which selects ``nn.Linear`` only, leaves out, and how to include it."""
    kinds = {
        "Conv1D layers": sum(is_conv1d(module) for module in model.modules()),
        "stacks of expert weights": sum(len(expert_stacks(module)) for module in model.modules()),
    }
    for kind, count in kinds.items():
        if count:
            log_once(
                logging.WARNING,
                f"{count} {kind} are not quantized: torchao's default filter selects nn.Linear only. Write "
                "quantize_(model, config, filter_fn=intscale_compile.linears_and_experts).",
            )


def _leaves(module: nn.Module, parameter_name: str) -> list[str]:
    """Names of the parameters to quantize: of a module of experts, every stack, unless one is named."""
    stacks = expert_stacks(module) if parameter_name == "weight" else {}
    return list(stacks) or [parameter_name]


def _is_left_out(weight: torch.Tensor) -> bool:
    return getattr(weight, LEFT_OUT, False)


def _may_fail(weight: torch.Tensor, config: IntScaleConfig) -> bool:
    """Whether the overflow proof may fail for good: codes that are fixed, or rows so long that no scale helps."""
    largest = 127 if config.weight_bits == 8 else -CODE_MIN
    return config.amplifier != "row" or ACTIVATION_MAX * largest * max(weight.shape[-2:]) > INT32_MAX


def _weights_of_call(model: nn.Module, config, filter_fn) -> Iterator[tuple[str, nn.Module, Any, IntScaleConfig]]:
    """Every weight that this ``quantize_`` call will hand to us, with its name, module and configuration."""
    if not isinstance(config, FqnToConfig):
        for name, module in _selected_modules(model, filter_fn or is_linear, ""):
            for leaf in _leaves(module, "weight"):
                yield f"{name}.{leaf}" if name else leaf, module, getattr(module, leaf, None), config
        return
    for module_name, module in model.named_modules():
        for leaf, chosen in _chosen_configs(config.fqn_to_config, module_name, module).items():
            for name in _leaves(module, leaf) if type(chosen) is IntScaleConfig else ():
                yield f"{module_name}.{name}" if module_name else name, module, getattr(module, name, None), chosen


def _chosen_configs(table, module_name: str, module: nn.Module) -> dict:
    """What ``FqnToConfig`` chooses for a module: its parameters before itself, exact names before patterns."""
    prefix = f"{module_name}." if module_name else ""
    names = {leaf: prefix + leaf for leaf, _ in module.named_parameters(recurse=False)}
    patterns = [(re.compile(key[3:]), chosen) for key, chosen in table.items() if key.startswith("re:")]
    chosen = {leaf: table[name] for leaf, name in names.items() if name in table}
    if not chosen and module_name in table:
        return {"weight": table[module_name]}
    for leaf, name in names.items():
        found = [config for pattern, config in patterns if pattern.fullmatch(name)]
        if found and leaf not in chosen:
            chosen[leaf] = next((config for config in found if config is not None), None)
    if chosen:
        return chosen
    for pattern, config in patterns:
        if pattern.fullmatch(module_name):
            return {"weight": config}
    return {"weight": table.get("_default")} if is_linear(module) else {}


def _selected_modules(module: nn.Module, filter_fn, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that ``quantize_`` selects; like it, this does not look inside a selected module."""
    if filter_fn(module, name):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _selected_modules(child, filter_fn, f"{name}.{child_name}" if name else child_name)


@register_quantize_module_handler(IntScaleConfig)
def _quantize_module(module: nn.Module, config: IntScaleConfig, *, parameter_name: str = "weight") -> nn.Module:
    plan = _current_plan()
    name = (plan.names.get(id(module), "") if plan else "") or type(module).__name__
    reason = plan.left_alone.get(id(module)) if plan else None
    if reason is not None:
        log_once(logging.INFO, f"{name}: {reason.value}")
        return module
    try:
        for leaf in _leaves(module, parameter_name):
            _quantize_parameter(module, config, leaf, f"{name}.{leaf}", plan)
    except IntScaleError:
        if plan is not None:
            plan.restore()
        raise
    return module


def _quantize_parameter(
    module: nn.Module, config: IntScaleConfig, parameter_name: str, name: str, plan: Optional[_Plan]
) -> None:
    parameter: Any = getattr(module, parameter_name, None)
    if isinstance(parameter, IntScaleTensor):
        log_once(logging.INFO, f"{name}: {Reason.ALREADY_QUANTIZED.value}")
        return
    _check_parameter(module, parameter, name)
    weight = parameter.detach()
    if is_conv1d(module) or expert_stacks(module).get(parameter_name, False):
        tensor = IntScaleTensor.from_hp(weight.mT, config, name=name).transpose(-2, -1)
    else:
        tensor = IntScaleTensor.from_hp(weight, config, name=name)
    if parameter_name == "weight" and (size := getattr(module, ROTATION, 0)):  # the tensor rotates from now on
        tensor = tensor.replaced(rotation=size)
    if plan is not None and plan.may_fail:
        plan.undo.append(functools.partial(setattr, module, parameter_name, parameter))
        plan.undo.append(functools.partial(module.__dict__.pop, "extra_repr", None))
    setattr(module, parameter_name, nn.Parameter(tensor, requires_grad=False))
    if isinstance(module, nn.Linear):
        module.extra_repr = types.MethodType(linear_extra_repr, module)  # type: ignore[method-assign]
    if plan is not None:
        plan.progress.add(name, weight.nbytes, tensor.nbytes_packed())


def _check_parameter(module: nn.Module, parameter, name: str) -> None:
    """Raise ``WeightError`` unless ``parameter`` of ``module`` can be quantized as the weight of a product."""
    if not isinstance(parameter, torch.Tensor) or isinstance(module, nn.Embedding):
        kind = type(module).__name__
        raise WeightError(f"{name}: {kind} has no linear weight of that name; select other modules in filter_fn.")
    check_weight(parameter.detach(), name)
