"""Tensors computed from weights, kept until a weight changes: its identity, address and version, and a sample of its memory.

What is noticed before the call that would use an old value:

* a parameter exchanged, ``parameter.data = other``, a write that PyTorch counts;
* a step of an optimizer, also a fused one, and ``load_state_dict``, also under ``torch.inference_mode``;
* on a CPU any dense write, through whatever it goes (:mod:`~intscale_compile.kernels.fingerprint`);
* ``torch._dynamo.reset()`` and ``intscale_compile.refresh(model)``, which forget.

On a GPU a dense write of another kind is noticed by the next call at the latest (:mod:`~.gpu_samples`): the first call after
it may still use old values. What no sample sees is a write to single rows or elements through ``.data``, numpy, a pointer, or
to an inference tensor: ``refresh(model)`` is for that.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..integrations.weight_updates import after_load_state_dict
from ..kernels import cpu_gemm
from ..kernels.fingerprint import Sample, sample_of, state_of, version_of
from ..tensors.fields import DATA_NAMES
from ..tensors.intscale_tensor import IntScaleTensor
from .gpu_samples import GpuSamples

_data = operator.attrgetter(*DATA_NAMES)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors with memory that a weight consists of."""
    return [part for part in _data(tensor) if part is not None] if isinstance(tensor, IntScaleTensor) else [tensor]


def state_of_weight(tensor: Tensor) -> tuple:
    """Changes when the weight was written to, as far as PyTorch counts, or exchanged what it consists of.

    Ask inside ``DisableTorchFunctionSubclass``.
    """
    if isinstance(tensor, IntScaleTensor):  # a write through a slice moves only the wrapper's version
        parts = parts_of(tensor)
        return (version_of(tensor), *map(id, parts), *map(state_of, parts))
    return state_of(tensor)


def samples_of(tensors: Iterable[Tensor]) -> list[Sample]:
    """Samples of the memory of weights that is on a CPU."""
    found = (sample_of(part) for tensor in tensors for part in parts_of(tensor))
    return [sample for sample in found if sample is not None]


def _anchor(tensor: Tensor) -> Tensor:
    """What to hold a weak reference to: ``Module.to`` refuses to exchange a tensor subclass that has one."""
    return tensor.qdata if isinstance(tensor, IntScaleTensor) else tensor


@dataclass
class _Kept:
    sources: tuple[weakref.ref, ...]
    states: tuple
    samples: list[Sample]
    value: Any


_kept: dict[tuple, _Kept] = {}
_gpus: dict[torch.device, GpuSamples] = {}
_forgotten = 0
_watching = False


def forgotten() -> int:
    """How often kept values were forgotten; who holds one looks for it again when this has changed."""
    return _forgotten


def remember(kind: str, tensors: Sequence[Tensor], how: tuple, make: Callable[[], Any]) -> Any:
    """``make()``, kept until one of ``tensors`` changes or dies."""
    _watch_updates()
    anchors = [_anchor(t) for t in tensors]
    key = (kind, tuple(map(id, anchors)), how)
    with DisableTorchFunctionSubclass():
        states = tuple(map(state_of_weight, tensors))
        kept = _kept.get(key)
        if (
            kept is not None
            and kept.states == states
            and all(r() is t for r, t in zip(kept.sources, anchors))
            and all(sample.same() for sample in kept.samples)
        ):
            return kept.value
        samples = samples_of(tensors)
        for part in (part for tensor in tensors for part in parts_of(tensor)):
            watch(part)
    value = make()
    forget_key = lambda _, key=key: _kept.pop(key, None)  # noqa: E731
    _kept[key] = _Kept(tuple(weakref.ref(t, forget_key) for t in anchors), states, samples, value)
    return value


def watch(tensor: Tensor) -> None:
    """Look at a weight that is on a GPU in each pass through the model from now on."""
    if tensor.device.type == "cuda" and not isinstance(tensor, FakeTensor):
        if tensor.device not in _gpus:
            _gpus[tensor.device] = GpuSamples(tensor.device, forget)
        _gpus[tensor.device].add(tensor)


def gpu_samples(tensors: Iterable[Tensor]) -> list[GpuSamples]:
    """What watches those of the weights that are on a GPU."""
    return [_gpus[device] for device in {tensor.device for tensor in tensors} if device in _gpus]


def forget(tensors: Iterable[Tensor]) -> None:
    """Drop what was computed from weights."""
    global _forgotten
    parts = [part for tensor in tensors for part in parts_of(tensor)]
    mine = set(map(id, parts))
    old = [key for key in _kept if not mine.isdisjoint(key[1])]
    for key in old:
        del _kept[key]
    for part in parts:
        cpu_gemm.forget(part)
    if old:
        _forgotten += 1


def forget_all() -> None:
    """Drop everything that was computed from weights."""
    global _forgotten
    _kept.clear()
    cpu_gemm.forget_all()
    _forgotten += 1


def refresh(model: torch.nn.Module) -> None:
    """Have the compiled graphs, and eager calls on a CPU, read the weights of ``model`` anew at their next call.

    For writes that nothing notices: to single rows or elements through ``.data``, numpy or a pointer, or to parameters that
    were made under ``torch.inference_mode``. Plain weights are quantized again, which takes as long as at compilation.
    """
    forget([*model.parameters(), *model.buffers()])


def _watch_updates() -> None:
    """From the first kept value on: steps of optimizers, and ``load_state_dict``."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_after_step)
        after_load_state_dict(lambda module: forget(_changed([*module.parameters(), *module.buffers()])))


def _after_step(optimizer: Any, *_: Any) -> None:
    forget(_changed([p for group in optimizer.param_groups for p in group["params"]]))


def _changed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of which something is kept."""
    known = {key for keys in _kept for key in keys[1]}
    return [tensor for tensor in tensors if id(_anchor(tensor)) in known]


def kept_from(tensor: Tensor) -> Optional[list]:
    """What is kept of one weight, for tests and reports."""
    return [kept.value for key, kept in _kept.items() if id(_anchor(tensor)) in key[1]]
