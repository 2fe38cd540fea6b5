"""The models that a graph is a part of, and what their description says about a weight of the graph.

A graph may be a piece of a model: behind a graph break, or a block that is compiled by itself. What is quantized is decided
for the whole model, as ``quantize`` decides it (``tensors.selection``), so that it does not matter where graphs are cut.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple, Optional

from torch import Tensor, fx

from ..integrations.dynamo_scope import guard_presence, modules_in_use
from ..reasons import Reason
from ..tensors.selection import DECIDED, is_decided, model_weights


class Choice(NamedTuple):
    """What is decided of one weight.

    Attributes:
        reason: why it is left alone unless it is named; None: it is quantized.
        decided: whether the weights of its model were chosen, so that a plain one was left out.
    """

    reason: Optional[Reason]
    decided: bool


class WholeModels:
    """Modules whose call is under way while a graph is compiled; nothing here keeps a model alive.

    Args:
        nodes: inputs of the graph.
    """

    def __init__(self, nodes: Iterable[fx.Node]):
        self._nodes = list(nodes)
        self._modules = [weakref.ref(module) for module in modules_in_use(self._nodes)]

    @property
    def known(self) -> bool:
        """Whether there is a module at all; there is none where a plain function is compiled."""
        return bool(self._modules)

    def choice(self, tensor: Tensor) -> Optional[Choice]:
        """What is decided of a weight in the outermost model that holds it; None where no module does."""
        return self._choices.get(id(tensor))

    @cached_property
    def _choices(self) -> dict[int, Choice]:
        guard_presence(self._nodes, DECIDED)
        self._nodes.clear()
        found: dict[int, Choice] = {}
        inner: set[int] = set()
        for module in (reference() for reference in self._modules):
            if module is None or id(module) in inner:
                continue
            inner |= {id(child) for child in module.modules()}
            decided = is_decided(module)
            for key, weight in model_weights(module).items():
                found.setdefault(key, Choice(weight.reason, decided))
        return found
