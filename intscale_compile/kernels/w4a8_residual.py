"""``intscale::w4a8_linear_add``: a linear and the addition of a residual behind it, as one op.

    out[m, n] = y[m, n] + residual[m, n]        y as in ``w4a8_linear``, rounded to ``dtype``; the sum rounded once more

The same to the bit as the linear and an addition, and what it saves is memory traffic: the norm behind the addition reads one
tensor and not two, and need not write the sum. Arguments are those of ``w4a8_linear``; ``residual`` has the shape and dtype of
the result. There is no gradient: the passes emit the op where nothing watches.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..errors import InputError
from .cpu_gemm import accumulate_cpu
from .prepared import on_gpu
from .w4a8_linear import WEIGHT_ARGS, apply_scales, check_operands

torch.library.define(
    "intscale::w4a8_linear_add",
    "(Tensor xq, Tensor token_scale, Tensor qdata, Tensor scale, Tensor row_scale, Tensor? bias, Tensor residual, "
    f"{WEIGHT_ARGS}, ScalarType dtype, int abi, bool overlap=False, Tensor? zero_point=None) -> Tensor",
)
LINEAR_ADD_OP = torch.ops.intscale.w4a8_linear_add.default


def check_residual(xq: Tensor, residual: Tensor, out_features: int, dtype: torch.dtype) -> None:
    """Raise ``InputError`` unless the residual is like the result."""
    shape = (*xq.shape[:-1], out_features)
    if tuple(residual.shape) != shape or residual.dtype != dtype or residual.device != xq.device:
        raise InputError(
            f"w4a8_linear_add: residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}, expected {dtype} "
            f"{shape} on {xq.device}: add it behind a w4a8_linear."
        )


def _check(
    xq: Tensor, qdata: Tensor, scale: Tensor, residual: Tensor, out_features: int, group_size: int, packing: str,
    dtype: torch.dtype, zero_point: Optional[Tensor],
) -> None:  # fmt: skip
    check_operands(xq, qdata, scale, out_features, group_size, packing, zero_point)
    check_residual(xq, residual, out_features, dtype)


@torch.library.impl("intscale::w4a8_linear_add", "CPU")
def _linear_add_cpu(
    xq, token_scale, qdata, scale, row_scale, bias, residual, out_features, group_size, scale_bits, packing, dtype, abi,
    overlap=False, zero_point=None,
):  # fmt: skip
    _check(xq, qdata, scale, residual, out_features, group_size, packing, dtype, zero_point)
    acc = accumulate_cpu(xq, qdata, scale, out_features, group_size, scale_bits, packing, zero_point)
    return apply_scales(acc, token_scale, row_scale, bias, dtype) + residual


@on_gpu("intscale::w4a8_linear_add")
def _linear_add_cuda(
    xq, token_scale, qdata, scale, row_scale, bias, residual, out_features, group_size, scale_bits, packing, dtype, abi,
    overlap=False, zero_point=None,
):  # fmt: skip
    from .triton_gemm import linear_cuda

    _check(xq, qdata, scale, residual, out_features, group_size, packing, dtype, zero_point)
    return linear_cuda(
        xq, token_scale, qdata, scale, row_scale, bias, out_features, group_size, scale_bits, packing, dtype,
        overlap=overlap, zero_point=zero_point, residual=residual,
    )  # fmt: skip


@torch.library.register_fake("intscale::w4a8_linear_add")
def _linear_add_fake(
    xq, token_scale, qdata, scale, row_scale, bias, residual, out_features, group_size, scale_bits, packing, dtype, abi,
    overlap=False, zero_point=None,
):  # fmt: skip
    _check(xq, qdata, scale, residual, out_features, group_size, packing, dtype, zero_point)
    return xq.new_empty((*xq.shape[:-1], out_features), dtype=dtype)
