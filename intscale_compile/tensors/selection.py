"""Which weights of a model are quantized: one description of the model, from which ``quantize``, torchao's ``quantize_``,
``calibrate`` and the compiler decide alike.

The rule. The weights of ``nn.Linear``, of GPT-2's ``Conv1D`` and stacks of expert weights are quantized. Left alone unless
they are named: output embeddings, weights shared with an input embedding, routers, layers of fewer than 16 features, weights of
float64 or complex numbers, and weights that the code around a layer reads itself (as a left operand, in one operator with
others, concatenated). A parameter that belongs to no such layer is left alone: nothing in a model says whether it is the
weight of a product. Only where a model has no such layer at all, the compiler takes the parameters that it finds in products;
``quantize`` finds nothing there.

A model that was quantized, or loaded quantized, is decided: what is plain in it was left out, and the compiler leaves it
alone however the graph is cut. Each of its modules carries a mark, an attribute that copying and pickling keep. A model that
has quantized weights and no marks, such as one that took a state dict, counts as decided while one of its modules is called.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..config import IntScaleConfig
from ..integrations.torch import local_tensor
from ..integrations.torchao import is_linear
from ..reasons import OUTPUT_NAMES, SMALLEST_FEATURES, Reason
from .expert_layers import expert_stacks, router_modules
from .intscale_tensor import IntScaleTensor
from .source_trees import own_method
from .weight_reads import called_methods, stacks_in_a_loop, weight_reads

WIDE_DTYPES = (torch.float64, torch.complex64, torch.complex128)  # of products that no kernel of ours takes
DECIDED = "_intscale_decided"  # attribute of every module of a model whose weights were chosen


@dataclass
class ModelWeight:
    """A parameter or buffer of two or more dimensions.

    Attributes:
        tensor: the parameter itself.
        owners: every module that holds it: the dotted name of the module, the module, and the parameter's name there.
        reason: why it is left alone unless it is named; None: it is quantized.
    """

    tensor: Tensor
    owners: list[tuple[str, nn.Module, str]] = field(default_factory=list)
    reason: Optional[Reason] = None

    @property
    def name(self) -> str:
        """Dotted name of the parameter, the first where it has several."""
        module, _, leaf = self.owners[0]
        return f"{module}.{leaf}" if module else leaf


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear layer of transformers' GPT-2, which keeps its weight as ``[K, N]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linears_and_experts(module: nn.Module, name: str = "") -> bool:
    """``filter_fn`` of ``quantize_`` for every kind of layer that we quantize: ``nn.Linear``, GPT-2's ``Conv1D``, and the
    stacks of expert weights of a mixture of experts.

    Output embeddings, tied weights, tiny layers and routers are left alone, as they are without a ``filter_fn``.
    """
    return is_linear(module) or is_conv1d(module) or bool(expert_stacks(module))


def model_weights(model: nn.Module) -> dict[int, ModelWeight]:
    """Every parameter and buffer of a model that may be the weight of a product, by id, with the default decision."""
    found: dict[int, ModelWeight] = {}
    reasons: dict[int, list[Reason]] = {}
    special = _special_layers(model)
    for name, module in model.named_modules():
        stacks = expert_stacks(module)
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if nn.parameter.is_lazy(tensor) or tensor.dim() < 2:
                continue
            entry = found.setdefault(id(tensor), ModelWeight(tensor))
            entry.owners.append((name, module, leaf))
            reason = _reason(module, leaf, tensor, leaf in stacks, special.get(id(module)))
            if reason is not None:
                reasons.setdefault(id(tensor), []).append(reason)
    has_layers = any(linears_and_experts(module) for module in model.modules())
    for key, given in reasons.items():
        found[key].reason = Reason.TIED_EMBEDDING if Reason.TIED_EMBEDDING in given else given[0]
        if found[key].reason is Reason.RAW_PARAMETER and not has_layers:
            found[key].reason = None
    return found


def output_config(config: IntScaleConfig, reason: Optional[Reason]) -> Optional[IntScaleConfig]:
    """How the weight of a product is quantized that would be left alone for ``reason``: as ``config.output_embedding`` says
    where it is an output embedding, which a product with an input embedding's weight is too; None for any other.
    """
    output = reason in (Reason.OUTPUT_EMBEDDING, Reason.TIED_EMBEDDING)
    return config.of_output_embedding if output else None


def left_alone_by_default(model: nn.Module) -> dict[int, Reason]:
    """Layers (by id) that are left alone unless they are named, with the reason."""
    return {
        id(module): weight.reason
        for weight in model_weights(model).values()
        for _, module, leaf in weight.owners
        if weight.reason is not None and leaf == "weight" and linears_and_experts(module)
    }


def is_transposed(module: nn.Module, leaf: str) -> bool:
    """Whether a module keeps a weight as ``[..., K, N]``."""
    return is_conv1d(module) or expert_stacks(module).get(leaf, False)


def _reason(module: nn.Module, leaf: str, tensor: Tensor, stacked: bool, special: Optional[Reason]) -> Optional[Reason]:
    """Why a module's own weight is left alone by default, apart from what shares it."""
    if isinstance(module, nn.Embedding):
        return Reason.TIED_EMBEDDING  # as the weight of a product
    if tensor.dtype in WIDE_DTYPES:
        return Reason.WEIGHT_DTYPE
    if isinstance(module, (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)):
        return Reason.ONE_OPERATOR
    if stacked:
        in_interface = isinstance(getattr(module, "is_transposed", None), bool)
        return Reason.EXPERTS if not in_interface and leaf in stacks_in_a_loop(type(module)) else None  # type: ignore[arg-type]
    if leaf != "weight" or not (is_linear(module) or is_conv1d(module)):
        return Reason.ROUTER if special is Reason.ROUTER else Reason.RAW_PARAMETER
    if special is None and min(tensor.shape) < SMALLEST_FEATURES:
        return Reason.TOO_SMALL
    return special


def _special_layers(model: nn.Module) -> dict[int, Reason]:
    """Layers (by id) with a part of their own: output embeddings, routers, and those whose weight other code reads."""
    special: dict[int, Reason] = {}
    for module in model.modules():
        for child, reason in _read_weights(module):
            if not (is_conv1d(child) and reason is Reason.UNKNOWN_FORM):
                special[id(child)] = reason
        if isinstance(module, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            special |= {id(module.linear1): Reason.ONE_OPERATOR, id(module.linear2): Reason.ONE_OPERATOR}
    special |= {id(module): Reason.ROUTER for module in router_modules(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name == known or name.endswith(f".{known}") for known in OUTPUT_NAMES):
            special[id(module)] = Reason.OUTPUT_EMBEDDING
        special |= {id(layer): Reason.OUTPUT_EMBEDDING for layer in _output_embeddings(module)}
    return special


def _read_weights(module: nn.Module) -> Iterator[tuple[nn.Module, Reason]]:
    """Modules whose weights a module reads itself in its ``forward``, that of its class or its own, or in a method that the
    module above calls by name."""
    kind: type = type(module)
    reads = [(module, weight_reads(kind))]
    own = own_method(module, "forward")
    if own is not None:
        reads.append((module, weight_reads(kind, own)))
    for path, method in called_methods(kind):
        reads += [(child, weight_reads(type(child), method)) for child in _children(module, path)]  # type: ignore[arg-type]
    for owner, found in reads:
        yield from ((child, reason) for path, reason in found.items() for child in _children(owner, path))


def _children(module: nn.Module, path: str) -> list[nn.Module]:
    """The modules at a dotted name, in which ``*`` stands for every child."""
    found = [module]
    for part in path.split(".") if path else ():
        named = [dict(parent.named_children()) for parent in found]
        found = [child for children in named for name, child in children.items() if part in ("*", name)]
    return found


def _output_embeddings(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that a model calls its output embeddings: one, or several that belong together."""
    ask = getattr(module, "get_output_embeddings", None)
    if not callable(ask):
        return
    try:
        output = ask()
    except Exception:  # the model's own code: models without one raise whatever they like
        return
    if isinstance(output, nn.Module):
        yield from output.modules()


def mark_decided(model: nn.Module) -> None:
    """Note on every module that its weights were chosen: what is plain in it now, the compiler leaves alone."""
    for module in model.modules():
        vars(module)[DECIDED] = True


def mark_loaded(model: nn.Module) -> None:
    """What :func:`mark_decided` does, and the descriptions of quantized layers, for a model that was loaded quantized."""
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), IntScaleTensor):
            show_quantized(module)
    if is_decided(model):
        mark_decided(model)


def is_decided(model: nn.Module) -> bool:
    """Whether the weights of a model were chosen: one of its modules is marked or has a quantized weight."""
    if any(DECIDED in vars(module) for module in model.modules()):
        return True
    return any(isinstance(local_tensor(parameter), IntScaleTensor) for parameter in model.parameters())


def show_quantized(module: nn.Module) -> None:
    """Let the description of a linear layer say how its weight is quantized. Copying and pickling keep it."""
    if isinstance(module, nn.Linear):
        module.extra_repr = functools.partial(linear_extra_repr, module)  # type: ignore[method-assign]


def linear_extra_repr(module: Any) -> str:
    """The description of a linear layer whose weight is quantized."""
    features = f"in_features={module.in_features}, out_features={module.out_features}, bias={module.bias is not None}"
    return f"{features}, weight={module.weight!r}"
