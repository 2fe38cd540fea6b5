"""``intscale::int_linear``: the accumulator of ``w4a8_accumulate`` with an epilogue on integers.

    y = rsh(acc * m_token * m_row, k_token + k_row - 16) + bias          Q16, saturating

``|acc| m m < 2**31 * 2**16.1 * 2**15``, so that int64 holds it. The accumulator comes from the kernels of the float form.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .arithmetic import saturate
from .define import integer_op
from .scalar import SCALED

ACCUMULATE = torch.ops.intscale.w4a8_accumulate


def _fake(xq: Tensor, token_scale: Tensor, qdata: Tensor, scale: Tensor, row_scale: Tensor, bias: Optional[Tensor],
          out_features: int, *_) -> Tensor:  # fmt: skip
    return xq.new_empty((*xq.shape[:-1], out_features), dtype=torch.int32)


def epilogue(acc: Tensor, token_scale: Tensor, row_scale: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The accumulator int32 ``[..., N]`` as Q16; the other arguments as of ``int_linear``."""
    y = SCALED(acc.to(torch.int64), token_scale.to(torch.int64), row_scale.to(torch.int64))
    return saturate(y if bias is None else y + bias.to(torch.int64))


EPILOGUE_OP = integer_op(
    "int_epilogue(Tensor acc, Tensor token_scale, Tensor row_scale, Tensor? bias) -> Tensor",
    lambda acc, *_: acc.new_empty(acc.shape, dtype=torch.int32),
)(epilogue)  # of an accumulator that was summed over ranks


@integer_op(
    "int_linear(Tensor xq, Tensor token_scale, Tensor qdata, Tensor scale, Tensor row_scale, Tensor? bias, int out_features, "
    "int group_size, int scale_bits, str packing, int abi, Tensor? zero_point=None) -> Tensor",
    _fake,
)
def LINEAR_OP(
    xq: Tensor, token_scale: Tensor, qdata: Tensor, scale: Tensor, row_scale: Tensor, bias: Optional[Tensor], out_features: int,
    group_size: int, scale_bits: int, packing: str, abi: int, zero_point: Optional[Tensor] = None,
) -> Tensor:  # fmt: skip
    """Linear layer of codes.

    Args:
        xq: int8 ``[..., K]``; token_scale: dyadic ``[..., 1]``.
        qdata, scale, zero_point: the stored weight, as of ``w4a8_linear``.
        row_scale: dyadic ``[N]``.
        bias: int32 Q16 ``[N]``, or None.

    Returns:
        int32 Q16 ``[..., N]``.
    """
    acc = ACCUMULATE(xq, qdata, scale, out_features, group_size, scale_bits, packing, abi, zero_point)
    return epilogue(acc, token_scale, row_scale, bias)
