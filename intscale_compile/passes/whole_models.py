"""The models that a graph is a part of, and what their description says about a weight of the graph.

A graph may be a piece of a model: behind a graph break, or a block that is compiled by itself. What is quantized is decided
for the whole model, as ``quantize`` decides it (``tensors.selection``), so that it does not matter where graphs are cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Optional

from torch import Tensor, fx, nn

from ..integrations.dynamo_scope import modules_in_use
from ..tensors.selection import ModelWeight, is_decided, model_weights


class WholeModels:
    """Modules whose call is under way while a graph is compiled.

    Args:
        nodes: inputs of the graph.
    """

    def __init__(self, nodes: Iterable[fx.Node]):
        self._modules: list[nn.Module] = modules_in_use(nodes)

    @property
    def known(self) -> bool:
        """Whether there is a module at all; there is none where a plain function is compiled."""
        return bool(self._modules)

    def weight(self, tensor: Tensor) -> Optional[ModelWeight]:
        """A weight as the outermost model that holds it describes it; None where no module does."""
        place = self._places.get(id(tensor))
        return None if place is None else place[0]

    def decided(self, tensor: Tensor) -> bool:
        """Whether the weights of a model that holds ``tensor`` were chosen, so that a plain one was left out."""
        place = self._places.get(id(tensor))
        return place is not None and place[1]

    def release(self) -> None:
        """Let go of the models."""
        self._modules, self._places = [], {}

    @cached_property
    def _places(self) -> dict[int, tuple[ModelWeight, bool]]:
        found: dict[int, tuple[ModelWeight, bool]] = {}
        inner: set[int] = set()
        for module in self._modules:
            if id(module) in inner:
                continue
            inner |= {id(child) for child in module.modules()}
            decided = is_decided(module)
            for key, weight in model_weights(module).items():
                found.setdefault(key, (weight, decided))
        return found
