"""Which weights of a model are quantized: the kinds of layer that we know, and what is left alone unless it is named."""

from __future__ import annotations

from torch import nn

from ..integrations.torchao import is_linear
from ..reasons import OUTPUT_NAMES, SMALLEST_FEATURES, Reason
from .expert_layers import expert_stacks, router_linears

LEFT_OUT = "_intscale_left_out"  # attribute of a parameter that a quantize_ call did not select
ROTATION = "_intscale_rotation"  # attribute of a module that rotates its input: the size of the Hadamard blocks


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear layer of transformers' GPT-2, which keeps its weight as ``[K, N]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linears_and_experts(module: nn.Module, name: str = "") -> bool:
    """``filter_fn`` of ``quantize_`` for every kind of layer that we quantize: ``nn.Linear``, GPT-2's ``Conv1D``, and the
    stacks of expert weights of a mixture of experts.

    Output embeddings, tied weights, tiny layers and routers are left alone, as they are without a ``filter_fn``.
    """
    return is_linear(module) or is_conv1d(module) or bool(expert_stacks(module))


def left_alone_by_default(model: nn.Module) -> dict[int, Reason]:
    """Modules (by id) that are left alone unless they are named: output embeddings, tied weights, routers, tiny layers."""
    reasons = dict.fromkeys(router_linears(model), Reason.ROUTER)
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = None
    if hasattr(model, "get_output_embeddings"):
        try:
            output = model.get_output_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            output = None
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and id(weight) in tied:
            reasons[id(module)] = Reason.TIED_EMBEDDING
        elif module is output or name.rsplit(".", 1)[-1] in OUTPUT_NAMES:
            reasons[id(module)] = Reason.OUTPUT_EMBEDDING
        elif (isinstance(module, nn.Linear) or is_conv1d(module)) and min(module.weight.shape) < SMALLEST_FEATURES:
            reasons[id(module)] = Reason.TOO_SMALL
    return reasons


def linear_extra_repr(module: nn.Linear) -> str:
    """The description of a linear layer whose weight is quantized."""
    return f"in_features={module.in_features}, out_features={module.out_features}, weight={module.weight!r}"
