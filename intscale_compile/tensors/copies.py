"""Copies of an ``IntScaleTensor``, comparison of two, and where its memory is. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedOpError, WeightError
from ..integrations.torch import TO_DLPACK
from ..kernels.cpu_gemm import forget
from .activation_parts import PER_WEIGHT
from .fields import ALL_NAMES
from .intscale_tensor import IntScaleTensor
from .operators import DENSE_MEND, as_view, refuse

aten = torch.ops.aten
implements = IntScaleTensor.implements
implements_torch_function = IntScaleTensor.implements_torch_function
SET_DATA: list[Any] = [torch.Tensor.data.__set__]  # type: ignore[attr-defined]
TO_NUMPY: list[Any] = [torch.Tensor.numpy, torch.Tensor.__array__]
OF_MEMORY: list[Any] = [torch.Tensor.apply_, torch.Tensor.map_, torch.Tensor.map2_, torch.Tensor.__dlpack__]
DATA_PTR = [getattr(torch.Tensor, name) for name in ("data_ptr", "const_data_ptr") if hasattr(torch.Tensor, name)]
CUDA_ARRAY: list[Any] = [torch.Tensor.__cuda_array_interface__.__get__]  # type: ignore[attr-defined]
NOWHERE = 1 << 62  # set in addresses at which no machine has memory
SAME_LAYOUT = ("shape", "block_size", "transposed", "weight_bits", "rotation", "data_names")


@implements(aten.copy_.default)
def _(func, types, args, kwargs):
    target, source = args[:2]
    if not isinstance(target, IntScaleTensor) or not isinstance(source, IntScaleTensor):
        raise refuse("copy_ between a quantized and a plain tensor", "use IntScaleTensor.from_hp or dequantize()")
    source = source.to_packing(target.packing_format)
    for name in SAME_LAYOUT:
        if getattr(target, name) != getattr(source, name):
            raise refuse(f"copy_ from {name} {getattr(source, name)} into {getattr(target, name)}", "make them alike")
    if source.scale_bits > target.scale_bits or source.scale.dtype != target.scale.dtype:
        raise refuse(f"copy_ of {source.scale_bits}-bit scales into {target.scale_bits} bits", "make them alike")
    for name in target.data_names:
        part = getattr(target, name)
        if name in PER_WEIGHT:  # siblings may share theirs: the copy gets one of its own
            setattr(target, name, getattr(source, name).to(part.device, copy=True))
            continue
        part.copy_(getattr(source, name))
        if type(part) is torch.Tensor and not part.is_inference():
            torch.autograd.graph.increment_version(part)  # autograd does not see what happens in here
    forget(target.qdata)
    return target


@implements_torch_function(SET_DATA)
def _(func, types, args, kwargs):
    """``weight.data = other``, which PyTorch carries out on the empty wrapper: the parts of ``other`` become the weight's."""
    target, source = args
    mend = "give the module a new parameter (module.weight = torch.nn.Parameter(other, requires_grad=False))"
    if not isinstance(source, IntScaleTensor):
        raise refuse(
            "a plain tensor as .data of a quantized weight", f"quantize it (IntScaleTensor.from_hp), or {mend}"
        )
    for name in ("shape", "dtype", "device"):
        if getattr(target, name) != getattr(source, name):
            raise refuse(f".data of {name} {getattr(source, name)} in a weight of {name} {getattr(target, name)}", mend)
    forget(target.qdata)
    for name in ALL_NAMES:
        if name != "dtype":
            setattr(target, name, getattr(source, name))


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    tensor = args[0]
    options = tensor._get_to_kwargs(*args[1:], **{k: v for k, v in kwargs.items() if k != "memory_format"})
    device, dtype = torch.device(options["device"]), options["dtype"]
    if not dtype.is_floating_point:
        raise refuse(f"conversion to {dtype}", "a quantized weight claims a floating point dtype")
    move = lambda part: part.to(device, non_blocking=options["non_blocking"], copy=True)  # noqa: E731
    parts = {name: move(getattr(tensor, name)) for name in tensor.data_names}
    moved = tensor.replaced(**parts, dtype=dtype)
    # A GPU reads tiles faster; at rest, on a CPU, rows are plain.
    if device.type != tensor.device.type and device.type in ("cuda", "cpu"):
        moved = moved.to_packing("tiled" if device.type == "cuda" else "plain")
    return as_view(func, args, kwargs, moved)


@implements(aten.equal.default)
def _(func, types, args, kwargs):
    """Whether two weights are stored equal, in either packing; a quantized weight never equals a plain tensor."""
    one, other = args
    if not isinstance(one, IntScaleTensor) or not isinstance(other, IntScaleTensor):
        return False
    if one.dtype != other.dtype or any(getattr(one, name) != getattr(other, name) for name in SAME_LAYOUT):
        return False
    other = other.to_packing(one.packing_format)
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in one.data_names)


@implements([aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default])
def _(func, types, args, kwargs):
    """A plain tensor of the dtype and on the device that the weight claims."""
    return func(torch.empty((), dtype=args[0].dtype, device=args[0].device), *args[1:], **kwargs)


@implements(aten.is_pinned.default)
def _(func, types, args, kwargs):
    return all(func(getattr(args[0], name), *args[1:], **kwargs) for name in args[0].data_names)


@implements(aten._pin_memory.default)
def _(func, types, args, kwargs):
    parts = {name: func(getattr(args[0], name), *args[1:], **kwargs) for name in args[0].data_names}
    return args[0].replaced(**parts)


@implements(aten.expand.default)
def _(func, types, args, kwargs):
    tensor, sizes = args[0], list(args[1])
    if len(sizes) != tensor.dim() or any(size not in (-1, have) for size, have in zip(sizes, tensor.shape)):
        raise refuse(f"expand of {tuple(tensor.shape)} to {tuple(sizes)}, which repeats packed data", DENSE_MEND)
    return as_view(func, args, kwargs, tensor.replaced())


@implements_torch_function(OF_MEMORY)
def _(func, types, args, kwargs):
    """PyTorch would read and write at the address of the empty wrapper, which ends the process."""
    raise refuse(f"{func.__name__} reads memory that a quantized weight does not have", DENSE_MEND)


@implements_torch_function(torch.norm_except_dim)
def _(func, types, args, kwargs):
    """For ours of operators, a NotImplementedError, PyTorch takes it that weight_norm has no inverse, and goes on."""
    raise WeightError(
        "a quantized weight cannot be parametrized by weight_norm: remove the parametrization before quantize_ "
        "(torch.nn.utils.parametrize.remove_parametrizations)."
    )


@implements_torch_function(DATA_PTR)
def _(func, types, args, kwargs):
    """A number that two weights share if and only if they share their codes; no address: who reads there fails at once.

    Libraries tell tensors apart by it. The wrapper's own is 0 for every weight, and accelerate, where one of them is tied, gives
    all layers that one. torch itself recognizes wrappers by 0, without asking here.
    """
    address = args[0].qdata.data_ptr()
    return address and address | NOWHERE


@implements_torch_function(CUDA_ARRAY)
def _(func, types, args, kwargs):
    if args[0].is_cuda:
        raise refuse("__cuda_array_interface__ is of memory that a quantized weight does not have", DENSE_MEND)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))  # which says that it is not on a GPU


def _refuse_capsules(to_dlpack: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """torch.utils.dlpack.to_dlpack asks no subclass: the capsule would hold a null pointer, which ends who reads it."""

    def checked(tensor: Any) -> Any:
        if isinstance(tensor, IntScaleTensor):
            raise refuse("to_dlpack reads memory that a quantized weight does not have", DENSE_MEND)
        return to_dlpack(tensor)

    return checked


for _name in TO_DLPACK:
    _name.wrap(_refuse_capsules)


@implements_torch_function(TO_NUMPY)
def _(func, types, args, kwargs):
    raise UnsupportedOpError(
        "IntScaleTensor: a quantized weight is no NumPy array, so accelerate's disk_offload cannot store it; offload to the CPU "
        "(accelerate.cpu_offload), or use weight.dequantize() first."
    )
