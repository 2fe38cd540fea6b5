"""``intscale::w4a8_linear_add``: a linear and the addition of a residual behind it, as one op.

    out[m, n] = y[m, n] + residual[m, n]        y as in ``w4a8_linear``, rounded to ``dtype``; the sum rounded once more

The same to the bit as the linear and an addition, and what it saves is memory traffic: the norm behind the addition reads one
tensor and not two, and need not write the sum. Arguments are those of ``w4a8_linear``; ``residual`` has the shape and dtype of
the result. There is no gradient: the passes emit the op where nothing watches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .arguments import LinearAddArguments, form, operands, schema, stored, takes
from .cpu_gemm import accumulate_cpu
from .prepared import on_gpu
from .w4a8_linear import apply_scales, check_operands

torch.library.define("intscale::w4a8_linear_add", schema(LinearAddArguments))
LINEAR_ADD_OP = torch.ops.intscale.w4a8_linear_add.default


def check_residual(xq: Tensor, residual: Tensor, out_features: int, dtype: torch.dtype) -> None:
    """Raise ``InputError`` unless the residual is like the result."""
    shape = (*xq.shape[:-1], out_features)
    if tuple(residual.shape) != shape or residual.dtype != dtype or residual.device != xq.device:
        raise InputError(
            f"w4a8_linear_add: residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}, expected {dtype} "
            f"{shape} on {xq.device}: add it behind a w4a8_linear."
        )


def _check(a: LinearAddArguments) -> None:
    check_operands(a.xq, *stored(a))
    check_residual(a.xq, a.residual, a.out_features, a.dtype)


@torch.library.impl("intscale::w4a8_linear_add", "CPU")
@takes(LinearAddArguments)
def _linear_add_cpu(a: LinearAddArguments) -> Tensor:
    _check(a)
    acc = accumulate_cpu(a.xq, a.qdata, a.scale, *form(a), a.zero_point)
    return apply_scales(acc, a.token_scale, a.row_scale, a.bias, a.dtype) + a.residual


@on_gpu("intscale::w4a8_linear_add")
@takes(LinearAddArguments)
def _linear_add_cuda(a: LinearAddArguments) -> Tensor:
    # Imports Triton, which only GPUs need.
    from .triton_gemm import linear_cuda

    _check(a)
    return linear_cuda(*operands(a), *form(a), a.dtype, overlap=a.overlap, zero_point=a.zero_point, residual=a.residual)


@torch.library.register_fake("intscale::w4a8_linear_add")
@takes(LinearAddArguments)
def _linear_add_fake(a: LinearAddArguments) -> Tensor:
    _check(a)
    return a.xq.new_empty((*a.xq.shape[:-1], a.out_features), dtype=a.dtype)
