"""Which modules hold stacks of expert weights, how these are laid out, and which linear layers route.

transformers keeps the weights of all experts of a layer in 3-D parameters: ``[E, N, K]`` in most models, ``[E, K, N]`` in
some (gpt-oss, Llama 4, Aria). Routers decide which experts a token sees: a small error there changes the whole result, and
they have few weights, so they stay in high precision.
"""

from __future__ import annotations

import re

from torch import nn

from ..reasons import SMALLEST_FEATURES

ROUTER_CLASS = re.compile(r"Router|TopKGating|(MoE|TopK)\w*Gate$")
ROUTER_NAMES = ("gate", "router")  # of a linear layer beside ``experts``


def expert_stacks(module: nn.Module) -> dict[str, bool]:
    """Stacks of expert weights among a module's own parameters: their names, and whether they are kept as ``[E, K, N]``."""
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False)
        if not nn.parameter.is_lazy(parameter)
        and parameter.dim() == 3
        and parameter.is_floating_point()
        and min(parameter.shape[1:]) >= SMALLEST_FEATURES
    }
    counts = {value for name, value in vars(module).items() if "expert" in name and isinstance(value, int)}
    by_class = "expert" in type(module).__name__.lower()
    shapes = {name: shape for name, shape in shapes.items() if by_class or shape[0] in counts}
    transposed = bool(shapes) and _kept_transposed(module, shapes)
    return dict.fromkeys(shapes, transposed)


def _kept_transposed(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> bool:
    flag = getattr(module, "is_transposed", None)  # modules that take part in transformers' experts interface
    if isinstance(flag, bool):
        return flag
    down = [shape for name, shape in shapes.items() if "down" in name]
    up = [shape for name, shape in shapes.items() if "up" in name]
    if not down or not up:
        return False
    # The down projection goes back to the size that the up projection comes from.
    comes_from_last, comes_from_first = up[0][2] == down[0][1], up[0][1] == down[0][2]
    return comes_from_first and not comes_from_last


def router_linears(model: nn.Module) -> set[int]:
    """The ``nn.Linear`` modules (by id) that choose experts: those of a router class, and ``gate`` beside ``experts``."""
    return {id(layer) for layer in router_modules(model) if isinstance(layer, nn.Linear)}


def router_modules(model: nn.Module) -> list[nn.Module]:
    """Every module that takes part in choosing experts; the weight of a router may be a parameter of its own."""
    routers = []
    for module in model.modules():
        children = dict(module.named_children())
        routers += [children[name] for name in ROUTER_NAMES if name in children and "experts" in children]
        routers += [module] if ROUTER_CLASS.search(type(module).__name__) else []
    return [layer for router in routers for layer in router.modules()]
