"""The repeated layers of a model, and names for what belongs to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Optional

from torch import Tensor, nn

from ..integrations.torch import local_tensor

_ROOT = re.compile(r"^[LG]\['[^']*'\]")
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]|\.(\w+)")


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Dotted names of the layers that a model repeats: the entries of outermost lists of modules of one class."""
    return tuple(_blocks(model, ""))


def _blocks(module: nn.Module, prefix: str) -> Iterator[str]:
    module = getattr(module, "_orig_mod", module)
    children = {f"{prefix}.{name}" if prefix else name: child for name, child in module.named_children()}
    if _is_stack(module):
        yield from children
    else:
        for name, child in children.items():
            yield from _blocks(child, name)


def _is_stack(module: nn.Module) -> bool:
    children = [getattr(child, "_orig_mod", child) for child in module.children()]
    least = {nn.ModuleList: 1, nn.Sequential: 2}.get(type(module), len(children) + 1)
    one_class = len({type(child) for child in children}) == 1
    numbered = all(name.isdecimal() for name, _ in module.named_children())
    return len(children) >= least and one_class and numbered and any(True for _ in children[0].children())


def block_of(name: str, blocks: Iterable[str]) -> str:
    """The block among ``blocks`` that a dotted name lies in; empty where there is none."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix in blocks), "")


def dotted(source: str) -> str:
    """``layers.0.mlp`` of ``L['model'].layers.0.mlp`` or ``L['self']._modules['layers']._modules['0']._modules['mlp']``."""
    steps = (next(filter(None, groups)) for groups in _STEP.findall(_ROOT.sub("", source)))
    return without_wrappers(".".join(steps))


def without_wrappers(name: str) -> str:
    """A dotted name without the steps through modules that ``torch.compile`` wrapped."""
    return ".".join(step for step in name.split(".") if step != "_orig_mod")


class TensorNames:
    """Dotted names of the parameters and buffers of a model, found by identity; of a DTensor, by that of its local tensor."""

    def __init__(self, model: nn.Module):
        self._names: dict[int, list[str]] = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self._names.setdefault(id(local_tensor(tensor)), []).append(without_wrappers(name))

    def __call__(self, tensor: Optional[Tensor], otherwise: str) -> str:
        """Its name; of several the one that ``otherwise``, the graph's name for it, is or ends."""
        names = self._names.get(id(local_tensor(tensor)), [otherwise])
        return next((name for name in names if name == otherwise), names[0])
