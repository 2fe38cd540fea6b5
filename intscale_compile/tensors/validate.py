"""Checks on stored quantized data: a checkpoint may be truncated or altered, and its header may contradict its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .. import format as fmt
from ..config import GROUP_SIZES
from ..errors import CheckpointError
from .fields import ABSENT, DATA_NAMES, QDATA_DTYPES, SCALE_DTYPES
from .stored_files import reading

if TYPE_CHECKING:
    from .intscale_tensor import IntScaleTensor

MEND = "the checkpoint is damaged or was written by another version: save it again from the original model."


def _require(ok: bool, name: str, what: str) -> None:
    if not ok:
        raise CheckpointError(f"{name}: {what}; {MEND}")


def validate_tensor(tensor: IntScaleTensor, name: str) -> None:
    """Raise ``CheckpointError`` unless the parts of ``tensor`` fit together and lie in range."""
    with reading(name):  # parts of wrong types may fail anywhere
        _check_attributes(tensor, name)
        _check_shapes(tensor, name)
        if tensor.qdata.device.type != "meta" and not isinstance(tensor.qdata, FakeTensor):
            _check_values(tensor, name)


def _check_attributes(tensor: IntScaleTensor, name: str) -> None:
    for part in DATA_NAMES:
        value = getattr(tensor, part)
        given = isinstance(value, torch.Tensor) or (value is None and part in ABSENT)
        _require(given, name, f"{part} is {type(value).__name__}, not a tensor")
    block_size = tensor.block_size
    _require(isinstance(block_size, (list, tuple)) and len(block_size) > 0, name, f"block_size is {block_size!r}")
    dims = tensor.qdata.dim()
    _require(len(block_size) == dims, name, f"block_size is {block_size!r} where codes have {dims} dimensions")
    whole = all(type(size) is int for size in block_size) and all(size == 1 for size in block_size[:-1])
    _require(whole, name, f"block_size is {block_size!r}")
    _require(tensor.group_size in GROUP_SIZES, name, f"group size {tensor.group_size!r} is not one of {GROUP_SIZES}")
    packing = tensor.packing_format
    _require(
        isinstance(packing, str) and packing in ("plain", "tiled"),
        name,
        f"packing format {tensor.packing_format!r} is unknown",
    )
    for field in ("in_features", "out_features", "scale_bits"):
        value = getattr(tensor, field)
        _require(type(value) is int and value > 0, name, f"{field} is {value!r}")
    _require(isinstance(tensor.transposed, bool), name, f"transposed is {tensor.transposed!r}")
    _require(tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1, name, f"it claims the dtype {tensor.dtype}")
    _require(tensor.scale_bits <= 16, name, f"scale_bits is {tensor.scale_bits}")
    _require(tensor.qdata.dtype in QDATA_DTYPES, name, f"codes are {tensor.qdata.dtype}")
    _require(tensor.scale.dtype in SCALE_DTYPES, name, f"group scales are {tensor.scale.dtype}")
    _require(tensor.per_tensor_scale.dtype == torch.float32, name, f"row scales are {tensor.per_tensor_scale.dtype}")
    if tensor.zero_point is not None:
        _require(
            tensor.zero_point.dtype in (torch.int8, torch.int16), name, f"zero points are {tensor.zero_point.dtype}"
        )
        offset, bits = fmt.is_offset(tensor.zero_point), tensor.scale_bits
        _require(not offset or tensor.group_size != -1, name, "offsets of groups in a weight per channel")
        _require(not offset or bits >= fmt.OFFSET_BITS, name, f"offsets beside group scales of {bits} bits")
        _require(tensor.weight_bits == 4, name, "8-bit codes with zero points")
    if tensor.act_pre_scale is not None:
        _require(tensor.act_pre_scale.dtype == torch.float32, name, f"activation scale is {tensor.act_pre_scale.dtype}")
    fits = fmt.rotation_fits(tensor.rotation, tensor.in_features)
    _require(fits, name, f"rotation={tensor.rotation!r} does not fit {tensor.in_features} input features")
    if tensor.input_order is not None:
        _require(tensor.input_order.dtype == torch.int32, name, f"input order is {tensor.input_order.dtype}")
        _require(not tensor.rotation, name, f"an input order together with rotation={tensor.rotation}")
        _require(tensor.qdata.dim() == 2, name, "a stack of experts with an input order")
    _require(tensor.weight_bits == 4 or tensor.group_size == -1, name, "8-bit codes with group scales")


def _check_shapes(tensor: IntScaleTensor, name: str) -> None:
    lead = tuple(tensor.qdata.shape[:-2])
    _require(len(lead) <= 1 and tensor.qdata.dim() >= 2, name, f"codes have {tensor.qdata.dim()} dimensions")
    n, k, g = tensor.out_features, tensor.in_features, tensor.group_size
    rows = fmt.padded_out_features(n) if tensor.packing_format == "tiled" else n
    padded = fmt.padded_in_features(k, g)
    wanted = {
        "qdata": (*lead, rows, padded if tensor.weight_bits == 8 else padded // 2),
        "scale": (*lead, rows, fmt.num_groups(k, g)),
        "per_tensor_scale": (*lead, n, 1),
        "zero_point": (*lead, rows, fmt.num_groups(k, g)),
        "act_pre_scale": (*lead, 1, 1),
        "input_order": (1, k),
    }
    for part, shape in wanted.items():
        if getattr(tensor, part) is None:  # one of the parts that may be absent
            continue
        found = tuple(getattr(tensor, part).shape)
        _require(
            found == shape, name, f"{part} has shape {found} where {n} x {k} weights in groups of {g} need {shape}"
        )
    matrix = (k, n) if tensor.transposed else (n, k)
    found = tuple(tensor.shape)
    _require(found == (*lead, *matrix), name, f"it claims the shape {found} where its parts make {(*lead, *matrix)}")


def _check_values(tensor: IntScaleTensor, name: str) -> None:
    scale = tensor.scale
    least, most = int(scale.min()), int(scale.max())
    _require(least >= 1, name, f"a group scale is {least}; they start at 1")
    _require(
        most < 1 << tensor.scale_bits, name, f"a group scale is {most}, over the {tensor.scale_bits} bits declared"
    )
    rows = tensor.per_tensor_scale
    _require(bool(torch.isfinite(rows).all() and (rows > 0).all()), name, "a row scale is not a positive finite number")
    if tensor.zero_point is not None and not fmt.is_offset(tensor.zero_point):
        low, high = int(tensor.zero_point.min()), int(tensor.zero_point.max())
        within = low >= fmt.CODE_MIN and high <= fmt.CODE_MAX
        _require(within, name, f"zero points from {low} to {high}, beyond [-8, 7]")
    if tensor.act_pre_scale is not None:
        static = tensor.act_pre_scale
        good = bool((torch.isfinite(static) & (static > 0)).all())
        _require(good, name, "a static activation scale is not a positive finite number")
    if tensor.input_order is not None:
        known = fmt.is_permutation(tensor.input_order, tensor.in_features)
        _require(known, name, f"its input order is no permutation of {tensor.in_features} features")
    _require(not _codes_in_padding(tensor), name, f"codes beyond its {tensor.in_features} input features are not 0")
    bound = int(tensor.accumulator_bound().max())
    _require(bound <= fmt.INT32_MAX, name, f"the int32 accumulator could reach {bound}, over 2**31 - 1")


def _codes_in_padding(tensor: IntScaleTensor) -> bool:
    """Whether a code of the padding is not 0: then the weight has more input features than it says."""
    padded = fmt.padded_in_features(tensor.in_features, tensor.group_size)
    if padded == tensor.in_features:
        return False
    columns = fmt.code_block_columns(tensor.group_size, tensor.weight_bits)
    qdata = tensor.qdata
    if tensor.packing_format == "tiled":
        qdata = fmt.untile_rows(qdata, tensor.out_features, columns)
    last = qdata[..., (tensor.in_features // fmt.pack_block(tensor.group_size)) * columns :]  # blocks with padding
    codes = last if tensor.weight_bits == 8 else fmt.unpack_int4(last, tensor.group_size)
    return bool(codes[..., tensor.in_features - padded :].any())
