"""A model as it was before a call that failed: values of parameters and buffers, which they are, hooks and attributes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def restored_on_failure(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Give ``model`` back everything that it had, whatever exception the block ends with, ``KeyboardInterrupt`` too.

    Costs a copy of all parameters and buffers in host memory while the block runs; they may be changed in place there.

    Args:
        model: any module.
        enabled: False: nothing is kept, and a failure leaves the model half done.
    """
    before = _State(model) if enabled else None
    try:
        yield
    except BaseException:
        if before is not None:
            before.restore()
        raise


class _State:
    """Copies of all values in host memory, and of the dictionaries of all modules and their configurations."""

    def __init__(self, model: nn.Module):
        self.tensors = {id(t): _Kept(t) for t in (*model.parameters(), *model.buffers())}
        self.modules = [(module, _Attributes(module.__dict__, self.tensors)) for module in model.modules()]
        configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
        self.configs = [(config, dict(vars(config))) for config in configs.values() if hasattr(config, "__dict__")]

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            values = {key: kept.restored() for key, kept in self.tensors.items()}
        for module, attributes in self.modules:
            attributes.restore(module.__dict__, values)
        for config, known in self.configs:
            vars(config).clear()
            vars(config).update(known)


class _Kept:
    """One tensor: its value, and the object itself where something still holds it in the end."""

    def __init__(self, tensor: Tensor):
        self.object = weakref.ref(tensor)
        self.kind, self.requires_grad, self.device = type(tensor), tensor.requires_grad, tensor.device
        self.meta = tensor if tensor.is_meta else None
        self.value: Optional[Tensor] = None if tensor.is_meta else tensor.detach().to("cpu", copy=True)
        self.attributes = dict(tensor.__dict__)

    def restored(self) -> Tensor:
        """The tensor with its value."""
        if self.value is None:
            assert self.meta is not None
            return self.meta
        tensor = self.object()
        if tensor is None or tensor.shape != self.value.shape:
            tensor = self.value.to(self.device)
            if issubclass(self.kind, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=self.requires_grad)
        elif not torch.equal(tensor.detach().cpu(), self.value):
            tensor.detach().copy_(self.value)
        tensor.__dict__.clear()
        tensor.__dict__.update(self.attributes)
        return tensor


class _Attributes:
    """The attributes of a module; of those that are dictionaries (parameters, hooks, children) what is in them."""

    def __init__(self, attributes: dict[str, Any], tensors: dict[int, _Kept]):
        self.plain = {name: value for name, value in attributes.items() if not isinstance(value, dict)}
        self.inner = {name: (value, dict(value)) for name, value in attributes.items() if isinstance(value, dict)}
        for name in ("_parameters", "_buffers"):  # by number: the tensors themselves may be freed
            owner, entries = self.inner[name]
            self.inner[name] = owner, {key: None if t is None else _Number(id(t)) for key, t in entries.items()}

    def restore(self, attributes: dict[str, Any], values: dict[int, Tensor]) -> None:
        """Put them back into the dictionary that they came from."""
        attributes.clear()
        attributes.update(self.plain)
        for name, (owner, entries) in self.inner.items():
            owner.clear()
            owner.update({key: values[v] if isinstance(v, _Number) else v for key, v in entries.items()})
            attributes[name] = owner


class _Number(int):
    """The number of a tensor."""
