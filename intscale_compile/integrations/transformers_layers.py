"""Prompts compiled layer by layer: the decoder layers of a model of transformers share one graph, and the rest runs eagerly.

Inductor takes as long for a layer as for any of its copies, so a graph of the whole model takes as many times longer as there
are layers. A layer is told its number, which would make it another graph: it sees :class:`LayerCache` instead, to which its
number does not matter.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.17 has the second only


class LayerCache:
    """What a decoder layer sees of a static cache: its own part, whichever number it asks for."""

    def __init__(self, cache: Any, layer: Any):
        self._cache, self._layer = cache, layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Store keys and values ``[B, H, T, D]``; returns those of the whole cache."""
        return self._layer.update(keys, values, *args, **kwargs)

    def get_seq_length(self, layer_idx: Any = 0) -> Any:
        """Tokens that the cache holds."""
        return self._layer.get_seq_length()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def decoder_layers(model: nn.Module) -> dict[nn.Module, int]:
    """The layers of a decoder and their numbers, from 0 on; empty for a model in which they cannot be told."""
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer  # optional dependency
    except ImportError:
        return {}
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            numbers = {number for part in module.modules() if type(number := getattr(part, "layer_idx", None)) is int}
            if len(numbers) != 1 or "forward" in module.__dict__:
                return {}
            found[module] = numbers.pop()
    return found if sorted(found.values()) == list(range(len(found))) else {}


@contextmanager
def compiled_layers(
    layers: dict[nn.Module, int], tokens: int, compiled: Callable[[Callable], Callable]
) -> Iterator[list[nn.Module]]:
    """Run ``layers`` compiled; yields a list of those that did.

    Args:
        layers: modules and their numbers.
        tokens: length of the prompt, a dimension that the graph leaves open.
        compiled: gives the compiled form of a ``forward(self, ...)``, the same at each call.
    """
    ran: list[nn.Module] = []

    def forward_of(number: int) -> Callable:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = next((name for name in CACHE_NAMES if kwargs.get(name) is not None), None)
            if name is None:
                return type(self).forward(self, *args, **kwargs)
            mark_dynamic((*args, *kwargs.values()), tokens)
            cache = kwargs[name]
            kwargs[name] = LayerCache(cache, cache.layers[number])
            ran.append(self)
            return compiled(type(self).forward)(self, *args, **kwargs)

        return forward

    try:
        for layer, number in layers.items():
            layer.__dict__["forward"] = types.MethodType(forward_of(number), layer)
        yield ran
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def folding_output(model: Any) -> Iterator[None]:
    """Let the output embedding, which runs eagerly, see its tokens with the strides of memory of their own.

    They are a slice of all tokens. PyTorch takes one of those for a batch of matrices, and on a CPU copies the whole weight
    for it: 10 ms of 44 in a small model with a weight of 6 MB in bf16, 150 ms where it has 57 MB.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(output, nn.Module):
        yield
        return
    handle = output.register_forward_pre_hook(lambda module, args: (_packed(args[0]), *args[1:]) if args else args)
    try:
        yield
    finally:
        handle.remove()


def _packed(x: Any) -> Any:
    """``x``, or a copy of it where its strides are those of a slice."""
    if not isinstance(x, Tensor) or x.dim() < 3:
        return x
    packed = [1]
    for size in reversed(x.shape[1:]):
        packed.append(packed[-1] * size)
    return x if list(x.stride()) == packed[::-1] else x.clone(memory_format=torch.contiguous_format)


def mark_dynamic(values: Iterable[Any], tokens: int) -> None:
    """Say which sizes are the length of the prompt, so that the first compilation serves every length.

    Args:
        values: arguments; tensors among them, and in tuples, lists and dictionaries among them, are marked.
        tokens: length of the prompt.
    """
    for value in values:
        if isinstance(value, dict):
            mark_dynamic(value.values(), tokens)
        elif isinstance(value, (tuple, list)):
            mark_dynamic(value, tokens)
        elif isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                if dim and size == tokens or value.dim() == 1:
                    torch._dynamo.maybe_mark_dynamic(value, dim)
