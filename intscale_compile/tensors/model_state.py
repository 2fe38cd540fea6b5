"""What the modules of a model hold, kept so that a failed change can be taken back whole."""

from __future__ import annotations

from typing import Any, Optional

from torch import nn

from .untied import configurations

_CONTAINERS = frozenset(vars(nn.Module()))  # torch's own: parameters, buffers, children, hooks


class ModelState:
    """Attributes of every module of a model, and what its parameters, buffers, children and hooks are; of its configuration
    whether embeddings are tied.

    Tensors are kept, not copied: a parameter that was exchanged comes back, one that was written to does not.
    """

    def __init__(self, model: nn.Module):
        self._kept = [(module, type(module), _attributes(module)) for module in model.modules()]
        self._ties = [(c, c.tie_word_embeddings) for c in configurations(model) if hasattr(c, "tie_word_embeddings")]

    def restore(self) -> None:
        """Give every module back what it had, in the order in which it had it."""
        for config, tied in self._ties:
            config.tie_word_embeddings = tied
        for module, kind, kept in self._kept:
            attributes = vars(module)
            if type(module) is not kind:
                module.__class__ = kind  # type: ignore[assignment]
            for name in [name for name in attributes if name not in kept]:
                del attributes[name]
            for name, (value, content) in kept.items():
                attributes[name] = value
                if content is not None and not _same(value, content):
                    value.clear()
                    value.update(content)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Optional[Any]]]:
    kept: dict[str, tuple[Any, Optional[Any]]] = {}
    for name, value in vars(module).items():
        container = name in _CONTAINERS and isinstance(value, (dict, set))
        kept[name] = (value, value.copy() if container else None)
    return kept


def _same(now: Any, before: Any) -> bool:
    """Whether two containers hold the same objects in the same order (tensors cannot be compared)."""
    if isinstance(now, set):
        return now == before
    pairs = zip(now.items(), before.items())
    return len(now) == len(before) and all(k is j and v is w for (k, v), (j, w) in pairs)
