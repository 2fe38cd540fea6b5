"""Structure of a model, found by running it: blocks, and the weights of a block in order of dataflow.

Nothing here goes by the names of classes or parameters. A block is run once on a recorded input while every product with
one of its parameters is observed: products that read one tensor form a stage, and the order of the products is the order
of the stages.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..errors import CalibrationError
from ..tensors.expert_layers import expert_stacks, router_linears
from ..tensors.selection import is_conv1d

Inputs = tuple[tuple, dict[str, Any]]  # positional and keyword arguments of a block
Callback = Callable[[str, Optional[int], Tensor], None]
_X_FIRST = (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm)


@dataclass(frozen=True)
class LinearWeight:
    """A parameter that a block multiplies activations with.

    Attributes:
        name: name of the parameter's owner inside the block, for a stack of experts followed by the parameter's name:
            ``self_attn.q_proj``, ``mlp.experts.down_proj``.
        module: the module that owns it.
        parameter: its name in that module.
        transposed: whether it is kept as ``[..., K, N]`` (GPT-2's ``Conv1D``, some stacks of experts).
        router: whether it chooses experts; such weights take part in scaling but are not quantized.
    """

    name: str
    module: nn.Module
    parameter: str
    transposed: bool = False
    router: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight as ``[..., N, K]``: a view of the parameter, so writing to it changes the model."""
        stored = getattr(self.module, self.parameter).detach()
        return stored.mT if self.transposed else stored

    @property
    def bias(self) -> Optional[Tensor]:
        """The bias that belongs to it, ``[..., N]``, or None."""
        named = "bias" if self.parameter == "weight" else f"{self.parameter}_bias"
        bias = getattr(self.module, named, None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def qualified(self) -> str:
        """Name of the parameter inside the block, as ``named_parameters`` says it."""
        return self.name if self.parameter != "weight" else f"{self.name}.weight"


def stacks(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The lists of repeated layers of a model, outermost ``nn.ModuleList`` of modules with linear weights inside.

    One list for a decoder or an encoder, two for an encoder-decoder. Each entry is a name in the model and a module.

    Raises:
        CalibrationError: there is none.
    """
    found: list[list[tuple[str, nn.Module]]] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if not all(any(_is_product(m) for m in layer.modules() if m is not layer) for layer in module):
            continue
        found.append([(f"{name}.{i}" if name else str(i), layer) for i, layer in enumerate(module)])
        inside |= {id(m) for m in module.modules()}
    if not found:
        raise CalibrationError(
            f"{type(model).__name__} has no nn.ModuleList of layers with linear weights: pass the transformers model itself."
        )
    return found


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every repeated layer of a model with its name, in order; those of an encoder before those of its decoder."""
    return [entry for stack in stacks(model) for entry in stack]


def record_inputs(model: nn.Module, batch: Any, names: Optional[Iterable[str]] = None) -> dict[str, Inputs]:
    """What each block is called with when the model runs on ``batch`` (token ids ``[B, T]`` or keyword arguments).

    Caches are switched off: a block can be called again with what is returned.
    """
    chosen = dict(blocks(model)) if names is None else {name: model.get_submodule(name) for name in names}
    recorded: dict[str, Inputs] = {}

    def remember(name: str):
        def hook(module, args, kwargs):
            recorded.setdefault(name, tree_map(_cloned, (args, dict(kwargs))))

        return hook

    handles = [
        block.register_forward_pre_hook(remember(name), with_kwargs=True, prepend=True)
        for name, block in chosen.items()
    ]
    try:
        with torch.no_grad(), without_cache(model):
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """``use_cache`` of the model's configuration (and of its parts) set to False for a while."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    kept = [(c, c.use_cache) for c in configs.values() if getattr(c, "use_cache", None)]
    try:
        for config, _ in kept:
            config.use_cache = False
        yield
    finally:
        for config, value in kept:
            config.use_cache = value


@contextlib.contextmanager
def eager_experts(block: nn.Module) -> Iterator[None]:
    """Mixtures of experts run expert by expert for a while, so that the input of each expert can be observed."""
    attribute = "_experts_implementation"
    kept = []
    for module in block.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, attribute, None) is not None:
            kept.append((config, getattr(config, attribute)))
            setattr(config, attribute, "eager")
    try:
        yield
    finally:
        for config, value in reversed(kept):
            setattr(config, attribute, value)


def run_block(block: nn.Module, inputs: Inputs) -> Tensor:
    """The hidden states that a block returns (the first tensor, where it returns several)."""
    result = block(*inputs[0], **inputs[1])
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def weights_of(block: nn.Module) -> dict[str, LinearWeight]:
    """Every parameter of a block that may be the weight of a product, by name, in order of declaration."""
    routers = router_linears(block)
    found: dict[str, LinearWeight] = {}
    for name, module in block.named_modules():
        for parameter, transposed in expert_stacks(module).items():
            found[f"{name}.{parameter}"] = LinearWeight(f"{name}.{parameter}", module, parameter, transposed)
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            router = id(module) in routers or not (isinstance(module, nn.Linear) or is_conv1d(module))
            found[name] = LinearWeight(name, module, "weight", is_conv1d(module), router)
    return found


@contextlib.contextmanager
def observe_inputs(block: nn.Module, weights: Iterable[LinearWeight], callback: Callback) -> Iterator[None]:
    """While a block runs, call ``callback(name, expert, x)`` for each product with one of the weights.

    ``x`` is the input ``[..., K]``; ``expert`` is the number of the expert whose weight it meets, None outside of stacks.
    """
    with _Products({weight.name: weight for weight in weights}, callback), eager_experts(block):
        yield


def stages(block: nn.Module, inputs: Inputs) -> list[list[LinearWeight]]:
    """The weights of a block in order of dataflow, those that read one tensor together.

    Llama: ``[[q, k, v], [o], [gate, up], [down]]``. Routers are in the stage of the experts that they choose.
    """
    return [stage.weights for stage in trace(block, inputs)]


def linears(block: nn.Module, inputs: Inputs) -> dict[str, LinearWeight]:
    """The weights of a block in order of dataflow, routers left out."""
    return {weight.name: weight for stage in stages(block, inputs) for weight in stage if not weight.router}


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or bool(expert_stacks(module))


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Products(TorchFunctionMode):
    """Calls back for every product of an activation with one of some weights, wherever and however it is written."""

    def __init__(self, weights: Mapping[str, LinearWeight], callback: Callback):
        super().__init__()
        self.callback = callback
        self.extents = []
        for name, weight in weights.items():
            stored = getattr(weight.module, weight.parameter)
            if type(stored) in (nn.Parameter, Tensor):
                start = stored.data_ptr()
                self.extents.append((start, start + stored.nbytes, name, stored.nbytes // len(stored), stored.dim()))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _X_FIRST or func is torch.addmm:
            operands = [*args, *kwargs.values()]
            x, weight = operands[:2] if func in _X_FIRST else operands[1:3]
            if isinstance(weight, Tensor) and type(x) is Tensor and type(weight) in (nn.Parameter, Tensor):
                self._report(x, weight)
        return func(*args, **kwargs)

    def _report(self, x: Tensor, weight: Tensor) -> None:
        place = weight.data_ptr()
        for start, end, name, size, dims in self.extents:
            if start <= place < end:
                with torch._C.DisableTorchFunction():
                    self.callback(name, (place - start) // size if dims == 3 else None, x.detach())
                return


@dataclass
class Stage:
    """Weights that read one tensor, and the norm that made it: its name, module and input."""

    weights: list[LinearWeight]
    norm: Optional[tuple[str, nn.Module, Tensor]] = None


def _key(x: Tensor) -> tuple:
    """Which data a tensor shows: views of the whole have the key of the whole."""
    return x.data_ptr(), x.numel(), x._version


def trace(block: nn.Module, inputs: Inputs) -> list[Stage]:
    """Stages of a block in order, with the norms that make their inputs."""
    weights = weights_of(block)
    owners = {weight.name: weight.module for weight in weights.values() if weight.weight.dim() == 3}
    alive: list[Tensor] = []  # a freed tensor's address may come back
    entered: dict[int, Tensor] = {}  # input of each module of experts
    norms: dict[tuple, tuple[str, nn.Module, Tensor]] = {}
    found: dict[tuple, Stage] = {}
    seen: set[str] = set()

    def product(name: str, expert: Optional[int], x: Tensor) -> None:
        alive.append(x)
        if name in seen:
            return
        seen.add(name)
        key, outer = _key(x), entered.get(id(owners.get(name)))
        if outer is not None and _has_row(outer, x):
            key = _key(outer)
        elif outer is not None:
            key = (name,)  # between two stacks of experts
        found.setdefault(key, Stage([])).weights.append(weights[name])

    def experts_entered(module, args, kwargs) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        entered[id(module)] = tensors[0]
        alive.append(tensors[0])

    def norm_left(name: str):
        def hook(module, args, result) -> None:
            if args and isinstance(result, Tensor):
                alive.append(result)
                norms.setdefault(_key(result), (name, module, args[0]))

        return hook

    handles = [
        module.register_forward_pre_hook(experts_entered, with_kwargs=True)
        for module in {id(owner): owner for owner in owners.values()}.values()
    ]
    handles += [m.register_forward_hook(norm_left(name)) for name, m in block.named_modules() if may_be_norm(m)]
    try:
        with torch.no_grad(), observe_inputs(block, weights.values(), product):
            run_block(block, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for key, stage in found.items():
        stage.norm = norms.get(key)
    return list(found.values())


def _has_row(outer: Tensor, x: Tensor) -> bool:
    rows = outer.reshape(-1, outer.shape[-1])
    return x.shape[-1] == rows.shape[-1] and bool((rows == x.reshape(-1, x.shape[-1])[0]).all(-1).any())


def may_be_norm(module: nn.Module) -> bool:
    """Whether a module has a weight per channel and nothing inside."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and not list(module.children())


def float_copy(block: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """A copy of a block and of its inputs in fp32, for comparisons before and after a change."""

    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return copy.deepcopy(block).float(), tree_map(widened, inputs)


def example_batch(model: nn.Module) -> Tensor:
    """A few token ids ``[1, 16]`` on the model's device, for finding a language model's structure."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.arange(1, 17).mul(977).remainder(vocabulary).unsqueeze(0)
    return ids.to(next(model.parameters()).device)
