"""``quantize``: every weight of a model planned and checked, then quantized; and what torchao's ``quantize_`` does with an
``IntScaleConfig``, which is the same.

torchao hands over one module at a time and says neither its name nor which model it belongs to. Its calls are therefore
watched where they can be seen whole (``integrations.torchao_calls``); the handler then carries out the plan of the call that
it runs in. A module that comes from elsewhere, from another library's loop over modules, is quantized by itself.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quant_api
from torchao.quantization.transform_module import register_quantize_module_handler

from ..config import IntScaleConfig
from ..errors import ConfigError, OverflowProofError
from ..integrations.torch import local_tensor
from ..integrations.torchao import is_linear
from ..integrations.torchao_calls import watch_quantize_calls
from ..progress import Progress
from ..reasons import Reason, log_once
from ..tensors.expert_layers import expert_stacks
from ..tensors.input_rotation import ROTATION, hand_over_rotation
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.model_state import ModelState
from ..tensors.selection import (
    ModelWeight,
    is_conv1d,
    is_transposed,
    linears_and_experts,
    mark_decided,
    model_weights,
    output_config,
    show_quantized,
)
from ..tensors.untied import announce_untied, note_untied
from ..tensors.weight_checks import check_module
from .output_probe import OutputProbe

Filter = Callable[[nn.Module, str], bool]
PLAN_KEY = "__intscale_plan__"  # among the variables of a call of torchao's that hands over a table module by module


def quantize(
    model: nn.Module, config: Union[IntScaleConfig, FqnToConfig], filter_fn: Optional[Filter] = None
) -> nn.Module:
    """Quantize the weights of a model in place: all of them, or none.

    Every weight is chosen and checked before the first one changes. Whatever ends the call early, an error of ours or of
    other code, a filter that raises, Ctrl-C or a lack of memory, the model is put back as it was: parameters, descriptions,
    marks and hooks. The original weights are therefore kept until the last one is quantized.

    A parameter that several layers share is quantized once, and stays shared. What is left out is marked on the modules, so
    that the compiler leaves it alone too (``tensors.selection``).

    Args:
        model: any model; its weights may not be sharded yet.
        config: for every selected layer, or a table of names and patterns (torchao's ``FqnToConfig``), which may also hold
            configurations of other libraries.
        filter_fn: takes a module and its name and says whether to quantize it. The default is ``linears_and_experts``. A
            layer that a filter of your own selects is named: an output embedding, say, is quantized then. Not with a table.

    Returns:
        The same model.

    Raises:
        WeightError: a selected layer has no weight that can be quantized; the message names it and the mend.
        OverflowProofError: the int32 accumulator of a weight cannot be proved free of overflow.
        ConfigError: ``config`` is of another kind, or comes with a ``filter_fn`` although it is a table.
    """
    if not isinstance(config, (IntScaleConfig, FqnToConfig)):
        raise ConfigError(f"config is {config!r}: pass an IntScaleConfig, or a FqnToConfig with some.")
    if isinstance(config, FqnToConfig) and filter_fn is not None:
        raise ConfigError("filter_fn cannot be used with FqnToConfig, whose names select the layers: leave it out.")
    with _planned(model, config, filter_fn or linears_and_experts) as plan:
        if isinstance(config, FqnToConfig):
            quant_api.quantize_(model, config, None)  # in order, with the handlers of the other libraries in it
        else:
            plan.apply_all()
    return model


def quantize_output_embedding(model: nn.Module, config: IntScaleConfig) -> list[str]:
    """Quantize the output embedding as ``config.output_embedding`` says, and nothing else; names of the parameters."""
    outputs = {
        id(module)
        for weight in model_weights(model).values()
        for _, module, leaf in weight.owners
        if leaf == "weight" and is_linear(module) and output_config(config, weight.reason) is not None
    }
    with _planned(model, config, lambda module, name: id(module) in outputs, with_probe=False) as plan:
        plan.apply_all()
    return [f"{plan.names[module]}.{leaf}" for module, leaf in plan.weights]


@dataclass
class _Weight:
    """A parameter that will be quantized, once for all the layers that share it.

    Attributes:
        name: dotted name, the first where it has several.
        parameter: the original.
        config: how.
        transposed: whether it is kept as ``[..., K, N]``.
        rotation: size of the Hadamard transform of the input that the layer applies so far, 0: none.
        packed: the quantized parameter, once it is made.
    """

    name: str
    parameter: Tensor
    config: IntScaleConfig
    transposed: bool
    rotation: int
    packed: Optional[nn.Parameter] = None

    def quantized(self) -> nn.Parameter:
        """The quantized parameter; the same one for every layer that shares the weight."""
        if self.packed is None:
            dense = self.parameter.detach()
            try:
                tensor = IntScaleTensor.from_hp(dense.mT if self.transposed else dense, self.config, name=self.name)
            except OverflowProofError as error:
                if self.name in str(error):
                    raise
                raise OverflowProofError(f"{self.name}: {error}") from None
            if self.rotation:  # the tensor rotates from now on
                tensor = tensor.replaced(rotation=self.rotation)
            self.packed = nn.Parameter(tensor.transpose(-2, -1) if self.transposed else tensor, requires_grad=False)
        return self.packed


@dataclass
class _Plan:
    """One call: which parameter of which module is quantized, what is left alone, and how the model was before."""

    state: ModelState
    names: dict[int, str]  # of modules
    weights: dict[tuple[int, str], _Weight] = field(default_factory=dict)  # by module and name of the parameter
    modules: dict[int, nn.Module] = field(default_factory=dict)
    left_alone: dict[tuple[int, str], Reason] = field(default_factory=dict)
    progress: Progress = field(default_factory=lambda: Progress(0, 0))
    untied: list[nn.Module] = field(default_factory=list)  # output embeddings that shared an input embedding's weight

    def apply_all(self) -> None:
        """Quantize every weight of the plan."""
        for module, leaf in list(self.weights):
            self.apply(self.modules[module], leaf)

    def apply(self, module: nn.Module, leaf: str) -> None:
        """Give a module its quantized weight, or say why it keeps the one that it has."""
        name = _joined(self.names.get(id(module), ""), leaf)
        reason = self.left_alone.get((id(module), leaf))
        if reason is not None:
            log_once(logging.INFO, f"{name}: {reason.value}")
            return
        weight = self.weights.get((id(module), leaf))
        if weight is None or isinstance(getattr(module, leaf), IntScaleTensor):
            return
        first = weight.packed is None
        setattr(module, leaf, weight.quantized())
        hand_over_rotation(module)
        show_quantized(module)
        if first:
            self.progress.add(name, weight.parameter.nbytes, weight.packed.nbytes_packed())  # type: ignore[union-attr]


_running: ContextVar[Optional[_Plan]] = ContextVar("intscale_plan", default=None)


@contextlib.contextmanager
def _planned(model: nn.Module, config: Any, filter_fn: Optional[Filter], with_probe: bool = True) -> Iterator[_Plan]:
    """Plan a call and let the handler carry out the plan; put the model back if anything is raised."""
    state = ModelState(model)
    token, plan = _running.set(None), None
    try:
        probe = OutputProbe(model) if with_probe else None
        plan = _make_plan(model, config, filter_fn, state)
        _running.set(plan)
        yield plan
        note_untied(model, plan.untied)
        if probe is not None and plan.weights:
            probe.compare(model)
    except BaseException:
        state.restore()
        raise
    finally:
        _running.reset(token)
        if plan is not None:
            plan.progress.close()


@contextlib.contextmanager
def _scope(model: nn.Module, config: Any, filter_fn: Any, call: Optional[dict]) -> Iterator[None]:
    """A call of torchao's: all of it, or with ``call``, its local variables, the step for one module of a table."""
    running = _running.get()
    if running is not None and id(model) in running.names and call is not None and PLAN_KEY not in call:
        yield  # quantize() handed its table to torchao
        return
    if call is None:
        with _planned(model, config, filter_fn):
            yield
        return
    plan = call.get(PLAN_KEY)
    state = plan.state if plan is not None else ModelState(model)
    token = _running.set(plan)
    try:
        if plan is None:
            plan = call[PLAN_KEY] = _make_plan(model, config, None, state)
            _running.set(plan)
        yield
        note_untied(model, plan.untied)
    except BaseException:
        state.restore()
        raise
    finally:
        _running.reset(token)


def _make_plan(model: nn.Module, config: Any, filter_fn: Optional[Filter], state: ModelState) -> _Plan:
    """Choose and check every weight of a call, and mark the model.

    Raises:
        WeightError: a selected weight cannot be quantized.
    """
    plan = _Plan(state, {id(module): name for name, module in model.named_modules()})
    defaults = model_weights(model)
    shared: dict[tuple, _Weight] = {}
    for module, leaf, chosen, by_name in _choices(model, config, filter_fn):
        name = _joined(plan.names[id(module)], leaf)
        present = module._parameters.get(leaf)
        if isinstance(local_tensor(present), IntScaleTensor):
            plan.left_alone[id(module), leaf] = Reason.ALREADY_QUANTIZED
            continue
        reason = defaults[id(present)].reason if id(present) in defaults else None
        output = output_config(chosen, reason) if is_linear(module) else None
        if reason is not None and not by_name and output is None:
            plan.left_alone[id(module), leaf] = reason
            continue
        chosen = output or chosen
        check_module(module, leaf, name)
        parameter: Tensor = getattr(module, leaf)
        if reason is Reason.TIED_EMBEDDING and is_linear(module):
            plan.untied.append(module)
            announce_untied(name, parameter, chosen)
        rotation = getattr(module, ROTATION, 0) if leaf == "weight" else 0
        weight = _Weight(name, parameter, chosen, is_transposed(module, leaf), rotation)
        key = id(parameter), repr(chosen), weight.transposed, rotation
        plan.weights[id(module), leaf] = shared.setdefault(key, weight)
        plan.modules[id(module)] = module
    _say_without_output(config, defaults, plan)
    plan.progress = Progress(len(shared), sum(weight.parameter.nbytes for weight in shared.values()))
    if filter_fn in (None, is_linear) and isinstance(config, IntScaleConfig):
        _warn_of_other_kinds(model)
    if plan.weights:  # a call that selects nothing decides nothing
        mark_decided(model)
    return plan


def _say_without_output(config: Any, defaults: dict[int, ModelWeight], plan: _Plan) -> None:
    """Warn where an output embedding was asked for and none is quantized by this call, or was before."""
    configs = config.fqn_to_config.values() if isinstance(config, FqnToConfig) else [config]
    if not any(isinstance(one, IntScaleConfig) and one.output_embedding for one in configs):
        return
    kinds = (Reason.OUTPUT_EMBEDDING, Reason.TIED_EMBEDDING)
    owners = [owner for w in defaults.values() if w.reason in kinds for owner in w.owners if is_linear(owner[1])]
    keys = [(id(module), leaf) for _, module, leaf in owners]
    if not any(key in plan.weights or plan.left_alone.get(key) is Reason.ALREADY_QUANTIZED for key in keys):
        why = f"the filter does not select {owners[0][0]}" if owners else "the model has none that is known"
        log_once(logging.WARNING, f"output_embedding: no output embedding is quantized: {why}.")


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
                "intscale_compile.quantize(model, config), or quantize_(model, config, filter_fn="
                "intscale_compile.linears_and_experts).",
            )


def _choices(
    model: nn.Module, config: Any, filter_fn: Optional[Filter]
) -> Iterator[tuple[nn.Module, str, IntScaleConfig, bool]]:
    """What a call selects: module, name of the parameter, configuration, and whether the layer was named for it."""
    if not isinstance(config, FqnToConfig):
        by_name = filter_fn not in (None, is_linear, linears_and_experts)
        for module in _selected(model, filter_fn or is_linear, ""):
            for leaf in _leaves(module, "weight"):
                yield module, leaf, config, by_name
        return
    for name, module in model.named_modules():
        chosen, by_name = _chosen_configs(config.fqn_to_config, name, module)
        for key, one in chosen.items():
            for leaf in _leaves(module, key) if type(one) is IntScaleConfig else ():
                yield module, leaf, one, by_name


def _leaves(module: nn.Module, parameter_name: str) -> list[str]:
    """Names of the parameters to quantize: of a module of experts, every stack, unless one is named."""
    stacks = expert_stacks(module) if parameter_name == "weight" else {}
    return list(stacks) or [parameter_name]


def _selected(module: nn.Module, filter_fn: Filter, name: str) -> Iterator[nn.Module]:
    """Modules that a filter selects; like torchao, this does not look inside a selected module."""
    if filter_fn(module, name):
        yield module
        return
    for child_name, child in module.named_children():
        yield from _selected(child, filter_fn, _joined(name, child_name))


def _chosen_configs(table: dict, module_name: str, module: nn.Module) -> tuple[dict[str, Any], bool]:
    """What ``FqnToConfig`` chooses for a module: its parameters before itself, exact names before patterns; and whether it
    names them, as ``_default`` does not.
    """
    names = {leaf: _joined(module_name, leaf) for leaf, _ in module.named_parameters(recurse=False)}
    patterns = [(re.compile(key[3:]), chosen) for key, chosen in table.items() if key.startswith("re:")]
    chosen = {leaf: table[name] for leaf, name in names.items() if name in table}
    if not chosen and module_name in table:
        return {"weight": table[module_name]}, True
    for leaf, name in names.items():
        found = [config for pattern, config in patterns if pattern.fullmatch(name)]
        if found and leaf not in chosen:
            chosen[leaf] = next((config for config in found if config is not None), None)
    if chosen:
        return chosen, True
    for pattern, config in patterns:
        if pattern.fullmatch(module_name):
            return {"weight": config}, True
    return ({"weight": table.get("_default")} if is_linear(module) else {}), False


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


@register_quantize_module_handler(IntScaleConfig)
def _quantize_module(module: nn.Module, config: IntScaleConfig, *, parameter_name: str = "weight") -> nn.Module:
    plan = _running.get()
    if plan is not None and id(module) in plan.names:
        for leaf in _leaves(module, parameter_name):
            plan.apply(module, leaf)
        return module
    log_once(
        logging.WARNING,
        f"a module ({type(module).__name__}) was handed over by itself, by code that is not torchao's quantize_: it is "
        "quantized, whatever its place in the model. Not guaranteed: output embeddings, tied weights and routers stay in high "
        "precision, and nothing is half changed after an error. Call intscale_compile.quantize(model, config) for that.",
    )
    table = FqnToConfig({parameter_name: config}) if parameter_name != "weight" else config
    with _planned(module, table, lambda selected, name: selected is module) as alone:
        alone.apply_all()
    return module


watch_quantize_calls(_scope, IntScaleConfig, _quantize_module)
