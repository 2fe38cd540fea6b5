"""Structural operators on ``IntScaleTensor``: they rearrange the packed parts (products: :mod:`.products`).

An operator that has no exact meaning on packed data raises ``UnsupportedOpError``; nothing is dequantized silently.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from .. import format as fmt
from ..errors import UnsupportedOpError
from .activation_parts import PER_WEIGHT, same_part
from .fields import DATA_NAMES
from .intscale_tensor import IntScaleTensor

aten = torch.ops.aten
implements = IntScaleTensor.implements
implements_torch_function = IntScaleTensor.implements_torch_function
PLAIN_MEND = "use weight.to_packing('plain') first, or weight.dequantize()"
DENSE_MEND = "use weight.dequantize() first"


def refuse(what: str, mend: str = PLAIN_MEND) -> UnsupportedOpError:
    """The error of an operator that has no exact meaning on packed data, with the mend."""
    return UnsupportedOpError(f"IntScaleTensor: {what}; {mend}.")


def as_view(func, args, kwargs, tensor: IntScaleTensor):
    """``tensor`` as the result of an operator that returns a view or a copy of its first argument."""
    return return_and_correct_aliasing(func, args, kwargs, tensor)


# --- structure --------------------------------------------------------------------------------------------------------


def stored_dim(tensor: IntScaleTensor, dim: int) -> int:
    """The dimension of the stored rows that ``dim`` of the (maybe transposed) tensor stands for, counted from 0."""
    dim = dim % tensor.dim()
    first = tensor.dim() - 2
    return dim if dim < first or not tensor.transposed else 2 * first + 1 - dim


def _slice(func, args, kwargs):
    tensor, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    stored = stored_dim(tensor, dim)
    length = tensor.shape[dim]
    start, end, step = slice(start, end, step).indices(length)
    end = max(start, end)
    if (start, end, step) == (0, length, 1):
        return as_view(func, args, kwargs, tensor.replaced())
    if stored == tensor.dim() - 1:
        return _slice_features(func, args, kwargs, tensor, start, end, step)
    columns = {name: getattr(tensor, name) for name in tensor.data_names}
    if stored == tensor.dim() - 2:
        columns = {name: part for name, part in columns.items() if name not in PER_WEIGHT}
        if tensor.packing_format == "tiled" and (
            step != 1 or start % fmt.TILE_N or (end % fmt.TILE_N and end != length)
        ):
            raise refuse(f"rows {start}:{end}:{step} of tiled packing are not whole tiles of {fmt.TILE_N}")
        rows = len(range(start, end, step))
        ends = {name: part.shape[stored] if end == length else end for name, part in columns.items()}
        parts = {name: aten.slice.Tensor(part, stored, start, ends[name], step) for name, part in columns.items()}
        return as_view(func, args, kwargs, tensor.replaced(**parts, out_features=rows))
    parts = {name: aten.slice.Tensor(part, stored, start, end, step) for name, part in columns.items()}
    return as_view(func, args, kwargs, tensor.replaced(**parts))


def _require_no_order(tensor: IntScaleTensor, what: str) -> None:
    if tensor.input_order is not None:
        raise refuse(f"{what} of a weight with an input order", DENSE_MEND)


def _slice_features(func, args, kwargs, tensor: IntScaleTensor, start: int, end: int, step: int):
    _require_no_order(tensor, f"input features {start}:{end}")
    align = fmt.k_alignment(tensor.group_size)
    if tensor.packing_format == "tiled" or step != 1 or start % align or (end % align and end != tensor.in_features):
        raise refuse(
            f"input features {start}:{end}:{step} of {tensor.packing_format} packing are not multiples of {align}",
            PLAIN_MEND if tensor.packing_format == "tiled" else DENSE_MEND,
        )
    if tensor.rotation and (start % tensor.rotation or end % tensor.rotation):
        raise refuse(f"input features {start}:{end} cut through blocks of rotation={tensor.rotation}", DENSE_MEND)
    last = tensor.dim() - 1
    padded_end = start + fmt.padded_in_features(end - start, tensor.group_size)
    per_column = 1 if tensor.weight_bits == 8 else 2
    qdata = aten.slice.Tensor(tensor.qdata, last, start // per_column, padded_end // per_column)
    parts = {"qdata": qdata}
    for name in ("scale", "zero_point") if tensor.group_size != -1 else ():
        part = getattr(tensor, name)
        if part is not None:
            parts[name] = aten.slice.Tensor(part, last, start // tensor.group_size, padded_end // tensor.group_size)
    return as_view(func, args, kwargs, tensor.replaced(**parts, in_features=end - start))


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    return _slice(func, args, kwargs)


@implements_torch_function([torch.narrow, torch.Tensor.narrow])
def _(func, types, args, kwargs):
    named = [kwargs[name] for name in ("input", "dim", "start", "length") if name in kwargs]
    tensor, dim, start, length = tuple(args) + tuple(named)
    size = tensor.shape[dim]
    first = start + size if start < 0 else start
    if not 0 <= first <= first + length <= size:
        raise IndexError(f"narrow: {length} entries from {start} on are outside dimension {dim} of size {size}")
    return aten.slice.Tensor(tensor, dim, first, first + length, 1)


def _require_stack(tensor: IntScaleTensor, dim: int, what: str) -> None:
    if tensor.dim() != 3 or dim % 3 != 0:
        shape = tuple(tensor.shape)
        raise refuse(f"{what} works along dimension 0 of a stack, not dimension {dim} of {shape}", DENSE_MEND)


def _select(tensor: IntScaleTensor, dim: int, index: int) -> IntScaleTensor:
    _require_stack(tensor, dim, "select")
    parts = {name: aten.select.int(getattr(tensor, name), 0, index) for name in tensor.data_names}
    return tensor.replaced(**parts, block_size=list(tensor.block_size[1:]))


@implements(aten.select.int)
def _(func, types, args, kwargs):
    return as_view(func, args, kwargs, _select(*args))


@implements(aten.unbind.int)
@implements_torch_function([torch.unbind, torch.Tensor.unbind])
def _(func, types, args, kwargs):
    tensor, dim = fill_defaults(args, 2, [0])
    dim = kwargs.get("dim", dim)
    _require_stack(tensor, dim, "unbind")
    return tuple(aten.select.int(tensor, 0, i) for i in range(tensor.shape[0]))


def _gather_rows(tensor: IntScaleTensor, dim: int, index: torch.Tensor) -> IntScaleTensor:
    stored = stored_dim(tensor, dim)
    if stored == tensor.dim() - 1 or index.dim() != 1 or index.dtype == torch.bool:
        raise refuse("indexing takes one 1-D integer index along experts or output rows", DENSE_MEND)
    is_rows = stored == tensor.dim() - 2
    if is_rows and tensor.packing_format == "tiled":
        raise refuse("single rows of tiled packing cannot be gathered")
    names = [name for name in tensor.data_names if not (is_rows and name in PER_WEIGHT)]
    parts = {name: aten.index_select.default(getattr(tensor, name), stored, index) for name in names}
    return tensor.replaced(**parts, **({"out_features": index.shape[0]} if is_rows else {}))


@implements(aten.index.Tensor)
def _(func, types, args, kwargs):
    tensor, indices = args
    used = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(used) != 1:
        raise refuse("indexing takes one 1-D integer index along experts or output rows", DENSE_MEND)
    return _gather_rows(tensor, *used[0])


@implements(aten.index_select.default)
def _(func, types, args, kwargs):
    return _gather_rows(*args)


@implements([aten.transpose.int, aten.t.default])
def _(func, types, args, kwargs):
    tensor, dim0, dim1 = fill_defaults(args, 3, [-2, -1])
    if {dim0 % tensor.dim(), dim1 % tensor.dim()} != {tensor.dim() - 2, tensor.dim() - 1}:
        raise refuse(f"only the last two dimensions can be transposed, not {dim0} and {dim1}", DENSE_MEND)
    return as_view(func, args, kwargs, tensor.replaced(transposed=not tensor.transposed))


@implements([aten.permute.default, aten.numpy_T.default])
def _(func, types, args, kwargs):
    tensor = args[0]
    order = [d % tensor.dim() for d in args[1]] if len(args) > 1 else list(reversed(range(tensor.dim())))
    identity = list(range(tensor.dim()))
    if order == identity:
        return as_view(func, args, kwargs, tensor.replaced())
    if order != [*identity[:-2], identity[-1], identity[-2]]:
        raise refuse(f"permute to {order}: only the last two dimensions can be exchanged", DENSE_MEND)
    return as_view(func, args, kwargs, tensor.replaced(transposed=not tensor.transposed))


@implements(aten.cat.default)
def _(func, types, args, kwargs):
    tensors, dim = fill_defaults(args, 2, [0])
    dim = kwargs.get("dim", dim)
    first = tensors[0]
    if not all(isinstance(t, IntScaleTensor) for t in tensors):
        raise refuse("cat of quantized and plain tensors", "quantize or dequantize all of them")
    same = ("block_size", "in_features", "transposed", "dtype", "weight_bits", "rotation")
    for name in same:
        if any(getattr(t, name) != getattr(first, name) for t in tensors):
            raise refuse(f"cat of weights that differ in {name}", "quantize them with one configuration")
    stored = stored_dim(first, dim)
    if stored == first.dim() - 1:
        raise refuse("cat along input features: every part has row scales of its own", "concatenate before quantizing")
    is_rows = stored == first.dim() - 2
    if not is_rows:
        for tensor in tensors:
            _require_no_order(tensor, "a stack of experts")
    if any((t.act_pre_scale is None) != (first.act_pre_scale is None) for t in tensors):
        raise refuse("cat of weights with static and with dynamic activation scales", "calibrate all of them alike")
    return concatenate(tensors, stored) if is_rows else _concatenate_experts(tensors)


@implements(aten.stack.default)
def _(func, types, args, kwargs):
    tensors, dim = fill_defaults(args, 2, [0])
    if kwargs.get("dim", dim) != 0 or not all(isinstance(t, IntScaleTensor) and t.dim() == 2 for t in tensors):
        raise refuse("stack of anything but matrices along a new first dimension")
    return aten.cat.default([_as_stack(tensor) for tensor in tensors], 0)


@implements(aten.unsqueeze.default)
def _(func, types, args, kwargs):
    tensor, dim = args
    if tensor.dim() != 2 or dim % 3 != 0 or tensor.transposed:
        raise refuse(
            f"unsqueeze of a weight of shape {tuple(tensor.shape)} at {dim}: a matrix becomes a stack of one only",
            DENSE_MEND,
        )
    return as_view(func, args, kwargs, _as_stack(tensor))


def _as_stack(tensor: IntScaleTensor) -> IntScaleTensor:
    """A matrix as a stack of one expert."""
    _require_no_order(tensor, "a stack of experts")
    parts = {name: getattr(tensor, name).unsqueeze(0) for name in tensor.data_names}
    return tensor.replaced(**parts, block_size=[1, *tensor.block_size])


def concatenate(tensors, stored: int) -> IntScaleTensor:
    """Concatenate output rows; the result is tiled where all parts are tiled and end on tile boundaries."""
    tiled = all(t.packing_format == "tiled" for t in tensors)
    whole = all(t.out_features % fmt.TILE_N == 0 for t in tensors[:-1])
    parts = list(tensors) if tiled and whole else [t.to_packing("plain") for t in tensors]
    _require_one_activation(parts)
    rows = [name for name in _joined_names(parts) if name not in PER_WEIGHT]
    data = {name: torch.cat([_widened(t, name, parts) for t in parts], dim=stored) for name in rows}
    joined = parts[0].replaced(
        **data, out_features=sum(t.out_features for t in parts), scale_bits=max(t.scale_bits for t in parts)
    )
    return joined.to_packing("tiled") if tiled else joined


def _require_one_activation(tensors) -> None:
    """Rows that are joined read one activation, which is gathered and quantized once."""
    if any(not same_part(t, tensors[0], "act_pre_scale") for t in tensors[1:]):
        raise refuse("cat of rows with different static activation scales", "calibrate them with one input")
    if any(not same_part(t, tensors[0], "input_order") for t in tensors[1:]):
        raise refuse("cat of rows with different input orders", DENSE_MEND)


def _joined_names(tensors) -> list[str]:
    """Names of the inner tensors that a join of ``tensors`` has: those that one of them has."""
    return [name for name in DATA_NAMES if any(getattr(t, name) is not None for t in tensors)]


def _widened(tensor: IntScaleTensor, name: str, among) -> torch.Tensor:
    part = getattr(tensor, name)
    if name == "zero_point" and any(fmt.is_offset(t.zero_point) for t in among):
        return _as_offset(tensor)
    if name == "zero_point" and part is None:
        return torch.zeros_like(tensor.scale, dtype=torch.int8)
    wide = name == "scale" and any(t.scale.dtype == torch.int16 for t in among)
    return part.to(torch.int16) if wide else part


def _as_offset(tensor: IntScaleTensor) -> torch.Tensor:
    """Zero points as offsets, in units of the row scale; 0 where there are none."""
    part = tensor.zero_point
    if part is None or fmt.is_offset(part):
        return torch.zeros_like(tensor.scale, dtype=torch.int16) if part is None else part
    if tensor.scale_bits > 12:
        raise refuse("cat of offsets and of zero points with scales of more than 12 bits", DENSE_MEND)
    return part.to(torch.int16) * tensor.scale.to(torch.int16)


def _concatenate_experts(tensors) -> IntScaleTensor:
    first = tensors[0]
    same = all(t.packing_format == first.packing_format for t in tensors)
    parts = list(tensors) if same else [t.to_packing("plain") for t in tensors]
    data = {name: torch.cat([_widened(t, name, parts) for t in parts], dim=0) for name in _joined_names(parts)}
    return parts[0].replaced(**data, scale_bits=max(t.scale_bits for t in parts))


@implements([aten.split.Tensor, aten.unsafe_split.Tensor])
def _(func, types, args, kwargs):
    tensor, size, dim = fill_defaults(args, 3, [0])
    dim = kwargs.get("dim", dim)
    return tuple(aten.slice.Tensor(tensor, dim, i, i + size, 1) for i in range(0, tensor.shape[dim], size))


@implements([aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default])
def _(func, types, args, kwargs):
    tensor, sizes, dim = fill_defaults(args, 3, [0])
    dim, start, parts = kwargs.get("dim", dim), 0, []
    length = tensor.shape[dim]
    if sum(sizes) != length:
        raise refuse(f"split of dimension {dim} of size {length} into {list(sizes)}", "give sizes that sum to it")
    for size in sizes:
        parts.append(aten.slice.Tensor(tensor, dim, start, start + size, 1))
        start += size
    return tuple(parts)


@implements([aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def _(func, types, args, kwargs):
    tensor, size = args
    size = [*size]
    if -1 in size:
        known = -torch.Size(size).numel()
        size[size.index(-1)] = tensor.numel() // max(known, 1)
    if tuple(size) == tuple(tensor.shape):
        return as_view(func, args, kwargs, tensor.replaced())
    merges = size[-1] == tensor.in_features and len(size) in (2, 3) and not tensor.transposed
    plain = tensor.packing_format == "plain"
    whole_tiles = plain or not merges or tensor.out_features % fmt.TILE_N == size[-2] % fmt.TILE_N == 0
    if not merges or torch.Size(size).numel() != tensor.numel() or not whole_tiles:
        raise refuse(
            f"view of {tuple(tensor.shape)} as {tuple(size)}: only experts and output rows can be merged or split",
            DENSE_MEND if plain else PLAIN_MEND,
        )
    if tensor.act_pre_scale is not None:
        raise refuse("view of a weight with a static activation scale, which is one per expert", DENSE_MEND)
    _require_no_order(tensor, f"view as {tuple(size)}")
    parts = {n: getattr(tensor, n).view(*size[:-1], getattr(tensor, n).shape[-1]) for n in tensor.data_names}
    block_size = [1] * (len(size) - 1) + [tensor.group_size]
    return as_view(func, args, kwargs, tensor.replaced(**parts, out_features=size[-2], block_size=block_size))


@implements([aten.mul_.Tensor, aten.div_.Tensor])
def _(func, types, args, kwargs):
    """In place by one positive number, as RWKV rescales its layers: the row scales take it, the codes and the proof stay."""
    tensor, factor = args
    number = factor.item() if isinstance(factor, torch.Tensor) and factor.numel() == 1 else factor
    if kwargs or not isinstance(tensor, IntScaleTensor) or not isinstance(number, (int, float)):
        raise refuse("in place it can be multiplied and divided by one positive number only", DENSE_MEND)
    rows = func(tensor.per_tensor_scale.clone(), number)
    if not bool((torch.isfinite(rows) & (rows > 0)).all()):
        raise refuse(f"{func} by {number} leaves row scales that are not positive and finite", DENSE_MEND)
    tensor.per_tensor_scale.copy_(rows)
    return tensor


@implements_torch_function(torch.Tensor.share_memory_)
def _(func, types, args, kwargs):
    for name in args[0].data_names:
        getattr(args[0], name).share_memory_()
    return args[0]
