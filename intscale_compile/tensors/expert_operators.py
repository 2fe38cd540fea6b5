"""Operators on stacks of experts: grouped and batched products, and the choice of experts by an index.

Importing this module registers them. ``stack[expert_ids]`` copies nothing: it gives ``SelectedExperts``, which the batched
product that follows reads in place. ``index_select`` copies packed data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from ..errors import UnsupportedOpError
from ..integrations.dynamo_scope import leave_to_python
from .experts import batched_linear, grouped_linear
from .intscale_tensor import IntScaleTensor

aten = torch.ops.aten
implements = IntScaleTensor.implements
implements_torch_function = IntScaleTensor.implements_torch_function


class SelectedExperts(TorchAOBaseTensor):
    """``stack[expert_ids]`` before anything is copied: ``[S, N, K]``, or ``[S, K, N]`` where the stack is transposed.

    Tensor data:
        stack: ``IntScaleTensor`` of 3 dimensions.
        expert_ids: integers ``[S]``.
    """

    tensor_data_names = ["stack", "expert_ids"]
    tensor_attribute_names: list[str] = []

    def __new__(cls, stack: IntScaleTensor, expert_ids: Tensor):  # noqa: D102  (the class says what the arguments are)
        shape = (expert_ids.shape[0], *stack.shape[1:])
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=stack.dtype, device=stack.device, requires_grad=False
        )

    def __init__(self, stack: IntScaleTensor, expert_ids: Tensor):
        super().__init__()
        self.stack = stack
        self.expert_ids = expert_ids

    def materialize(self) -> IntScaleTensor:
        """The chosen experts with packed data of their own."""
        return aten.index_select.default(self.stack, 0, self.expert_ids)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The chosen experts in floating point."""
        return self.materialize().dequantize(output_dtype)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"SelectedExperts(shape={tuple(self.shape)}, stack={self.stack!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Run what is defined here; everything else wants packed data of its own first."""
        if func not in cls._ATEN_OP_TABLE[cls]:
            raise UnsupportedOpError(f"SelectedExperts: {func} is not defined; use weight.materialize() first.")
        return super().__torch_dispatch__(func, types, args, kwargs or {})


SelectedExperts.__module__ = "intscale_compile.tensors.expert_operators"


@implements_torch_function(torch.Tensor.__getitem__)
def _getitem(func, types, args, kwargs):
    tensor, index = args
    chooses = isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64)
    if chooses and isinstance(tensor, IntScaleTensor) and tensor.dim() == 3:
        return SelectedExperts(tensor, index)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


leave_to_python(_getitem)


@SelectedExperts.implements([aten.transpose.int])
@SelectedExperts.implements_torch_function([torch.transpose, torch.Tensor.transpose])
def _(func, types, args, kwargs):
    tensor = args[0]
    return SelectedExperts(tensor.stack.transpose(*args[1:], **kwargs), tensor.expert_ids)


def _refuse(what: str, mend: str) -> UnsupportedOpError:
    return UnsupportedOpError(f"IntScaleTensor: {what}; {mend}.")


def _grouped(x: Any, weight: Any, offsets: Any) -> Tensor:
    if isinstance(x, TorchAOBaseTensor) or not isinstance(weight, IntScaleTensor) or weight.dim() != 3:
        raise _refuse("grouped_mm takes a plain activation and a stack of weights", "exchange the operands")
    if not weight.transposed:
        raise _refuse("grouped_mm would reduce over the output dimension", "write stack.transpose(-2, -1)")
    if x.dim() != 2 or offsets is None:
        raise _refuse("grouped_mm needs rows sorted by expert and their offsets", "use torch.bmm for equal groups")
    return grouped_linear(x, weight.transpose(-2, -1), offsets)  # type: ignore[arg-type]


@implements(aten._grouped_mm.default)
@implements_torch_function([torch._grouped_mm, torch.nn.functional.grouped_mm])
def _(func, types, args, kwargs):
    names = ("offs", "bias", "out_dtype")
    options = dict(zip(names, args[2:])) | {name: kwargs[name] for name in names if name in kwargs}
    x, weight = args[0] if args else kwargs["mat_a"], args[1] if len(args) > 1 else kwargs["mat_b"]
    if options.get("bias") is not None:
        raise _refuse("grouped_mm with a bias", "add it to the result")
    y = _grouped(x, weight, options.get("offs"))
    return y if options.get("out_dtype") is None else y.to(options["out_dtype"])


def register_fallback(packet: Any) -> None:
    """Define transformers' stand-in for grouped_mm, ``transformers::grouped_mm_fallback(x, weight, offs)``."""

    def grouped(func, types, args, kwargs):
        named = [kwargs[name] for name in ("input", "weight", "offs") if name in kwargs]
        return _grouped(*args, *named)

    implements([packet.default])(grouped)
    implements_torch_function([packet, packet.default])(grouped)


@implements([aten.bmm.default])
@implements_torch_function([torch.bmm, torch.Tensor.bmm])
def _bmm(func, types, args, kwargs):
    if kwargs.get("out") is not None:
        raise _refuse("bmm with out=", "use the result that it returns")
    left, right = list(args) + [kwargs[name] for name in ("input", "mat2") if name in kwargs]
    weights = [isinstance(t, TorchAOBaseTensor) for t in (left, right)]
    if all(weights):
        raise _refuse("bmm of two quantized weights", "dequantize one of them")
    if weights[0]:
        # W @ x = (x' @ W')'
        return _batched(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
    return _batched(left, right)


SelectedExperts.implements([aten.bmm.default])(_bmm)
SelectedExperts.implements_torch_function([torch.bmm, torch.Tensor.bmm])(_bmm)


def _batched(x: Tensor, weight: Any) -> Tensor:
    """``x @ weight`` of ``[S, M, K]`` and a transposed stack ``[S, K, N]``."""
    stack, ids = (weight.stack, weight.expert_ids) if isinstance(weight, SelectedExperts) else (weight, None)
    if not stack.transposed:
        raise _refuse("bmm would reduce over the output dimension", "transpose the weight")
    return batched_linear(x, stack.transpose(-2, -1), ids)
