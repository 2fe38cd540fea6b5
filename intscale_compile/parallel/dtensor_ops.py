"""What ``distribute_tensor`` and ``parallelize_module`` need of an ``IntScaleTensor``: to divide it and to send the parts.

Importing this module registers the operators. A DTensor then wraps each rank's shard; products and transposes of the shard
are those of any quantized weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.utils import fill_defaults

from ..errors import ShardingError, UnsupportedOpError
from ..integrations.after_import import after_import
from ..integrations.dynamo_scope import leave_to_python
from ..integrations.torch import CHECKPOINT_PROPERTIES
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.operators import stored_dim
from .sharding import Layout, shard_features

aten = torch.ops.aten
implements = IntScaleTensor.implements
implements_torch_function = IntScaleTensor.implements_torch_function


@implements_torch_function([torch.chunk, torch.Tensor.chunk])
def _chunk(func, types, args, kwargs):
    """Chunks along output rows are views; along input features, copies where packed codes do not allow a view."""
    named = [kwargs[name] for name in ("input", "chunks", "dim") if name in kwargs]
    tensor, chunks, dim = fill_defaults([*args, *named], 3, [0])
    if stored_dim(tensor, dim) != tensor.dim() - 1:
        with torch._C.DisableTorchFunctionSubclass():
            return func(tensor, chunks, dim)
    width = -(-tensor.in_features // chunks)
    edges = [*range(0, tensor.in_features, width), tensor.in_features]
    return tuple(shard_features(tensor, start, end) for start, end in zip(edges, edges[1:]))


leave_to_python(_chunk)


@implements(aten.empty_like.default)
def _(func, types, args, kwargs):
    tensor = args[0]
    if kwargs.get("dtype") not in (None, tensor.dtype):
        raise ShardingError("empty_like of a quantized weight keeps its dtype: quantize the other tensor itself.")
    device = kwargs.get("device") or tensor.device  # Module.to_empty gives one
    parts = {name: torch.empty_like(getattr(tensor, name), device=device) for name in tensor.data_names}
    return tensor.replaced(**parts)


def _no_gathering(what: Any) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"IntScaleTensor: {what} is not defined on packed data; to save or gather a sharded model use "
        "intscale_compile.tensor_parallel.gather_shards or save_shards."
    )


@implements(torch.ops._c10d_functional.all_gather_into_tensor.default)
def _(func, types, args, kwargs):
    """What ``DTensor.full_tensor`` asks first: it would lose parts of a weight.

    So does a product in inference mode from torch 2.14 on, where DTensor chooses to divide the weight in another way first.
    """
    raise UnsupportedOpError(
        f"{_no_gathering(func)} To call such a model, use torch.no_grad() instead of torch.inference_mode()."
    )


def _refuse_checkpoints(create: Callable) -> Callable:
    """``torch.distributed.checkpoint`` asks for a tensor's properties before it writes it: it would lose parts of a weight."""

    def create_from_tensor(tensor: Tensor) -> Any:
        if isinstance(tensor, IntScaleTensor):
            raise _no_gathering("torch.distributed.checkpoint")
        return create(tensor)

    return create_from_tensor


after_import("torch.distributed.checkpoint.metadata", lambda module: CHECKPOINT_PROPERTIES.wrap(_refuse_checkpoints))


def _same_layout(tensors: list[IntScaleTensor]) -> None:
    first = tensors[0]
    for other in tensors[1:]:
        if Layout.of(other) != Layout.of(first) or other.data_names != first.data_names:
            raise ShardingError(f"a collective takes weights of one layout, not {first!r} and {other!r}.")


def _check_received(tensor: IntScaleTensor) -> None:
    """Raise unless the received group scales are of the range that this rank's weight promises to the kernels."""
    largest = int(tensor.scale.max())
    if largest >= 1 << tensor.scale_bits:
        raise ShardingError(
            f"a rank sent a weight with a group scale of {largest} to one whose scales have {tensor.scale_bits} bits: load the "
            "same quantized weights on every rank, or pass src_data_rank=None."
        )


def _sendable(part: Tensor) -> Tensor:
    """The same memory in a dtype that backends send: neither gloo nor NCCL knows int16."""
    return part.view(torch.uint8) if part.dtype == torch.int16 else part


def _register_collectives() -> None:
    """Scatter and broadcast: of each part, one after another."""

    @implements(torch.ops.c10d.scatter_.default)
    def _(func, types, args, kwargs):
        outputs, inputs, *rest = args
        _same_layout([*outputs, *(tensor for given in inputs for tensor in given)])
        for name in outputs[0].data_names:
            received = [_sendable(getattr(output, name)) for output in outputs]
            sent = [[_sendable(getattr(t, name).contiguous()) for t in given] for given in inputs]
            work = func(received, sent, *rest, **kwargs)[1]
            work.wait()
        _check_received(outputs[0])
        return outputs, work

    @implements(torch.ops.c10d.broadcast_.default)
    def _(func, types, args, kwargs):
        tensors, *rest = args
        parts: list[Tensor] = [getattr(tensors[0], name) for name in tensors[0].data_names]
        for part in parts:
            work = func([_sendable(part)], *rest, **kwargs)[1]
            work.wait()
        _check_received(tensors[0])
        return tensors, work


if torch.distributed.is_available():
    _register_collectives()
