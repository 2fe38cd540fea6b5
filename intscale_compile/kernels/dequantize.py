"""``intscale::dequantize_per_token`` and ``intscale::dequantize_weight``: the DQ half of the Q/DQ form.

They make the quantized graph readable and runnable in plain PyTorch before it is fused; a fused graph holds neither.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .. import format as fmt
from .arguments import DequantizeTokenArguments, DequantizeWeightArguments, schema, takes

torch.library.define("intscale::dequantize_per_token", schema(DequantizeTokenArguments))
torch.library.define("intscale::dequantize_weight", schema(DequantizeWeightArguments))
TOKEN_OP = torch.ops.intscale.dequantize_per_token.default
WEIGHT_OP = torch.ops.intscale.dequantize_weight.default


def dequantize_per_token_aten(xq: Tensor, token_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``xq * token_scale``: int8 ``[..., K]`` and fp32 ``[..., 1]`` to ``dtype`` ``[..., K]``."""
    return (xq.to(torch.float32) * token_scale).to(dtype)


def unpack_weight(
    qdata: Tensor, scale: Tensor, out_features: int, group_size: int, packing: str, zero_point: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """Plain int8 codes ``[..., N, Kp]`` and group scales ``[..., N, G]`` of a stored weight in either packing.

    Zero points are subtracted from the codes, which then lie in [-15, 15]; padding codes must meet no activation. Offsets
    (:func:`unpack_offset`) are not: they are in other units.
    """
    zero_point = None if fmt.is_offset(zero_point) else zero_point
    if packing == "tiled":
        bits = 8 if qdata.dtype == torch.int8 else 4
        qdata = fmt.untile_rows(qdata, out_features, fmt.code_block_columns(group_size, bits))
        scale = fmt.untile_rows(scale, out_features, 1)
        zero_point = None if zero_point is None else fmt.untile_rows(zero_point, out_features, 1)
    codes = qdata if qdata.dtype == torch.int8 else fmt.unpack_int4(qdata, group_size)
    return (codes if zero_point is None else fmt.centered_codes(codes, zero_point)), scale


def unpack_offset(zero_point: Optional[Tensor], out_features: int, packing: str) -> Optional[Tensor]:
    """Offsets int16 ``[..., N, G]`` in plain row order; None where zero points are none or in units of the codes."""
    if zero_point is None or not fmt.is_offset(zero_point):
        return None
    return fmt.untile_rows(zero_point, out_features, 1) if packing == "tiled" else zero_point


@torch.library.impl("intscale::dequantize_per_token", "CompositeExplicitAutograd")
def _dequantize_per_token(xq: Tensor, token_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_per_token_aten(xq, token_scale, dtype)


@torch.library.register_fake("intscale::dequantize_per_token")
def _dequantize_per_token_fake(xq: Tensor, token_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return xq.new_empty(xq.shape, dtype=dtype)


@torch.library.impl("intscale::dequantize_weight", "CompositeExplicitAutograd")
@takes(DequantizeWeightArguments)
def _dequantize_weight(a: DequantizeWeightArguments) -> Tensor:
    codes, scale = unpack_weight(a.qdata, a.scale, a.out_features, a.group_size, a.packing, a.zero_point)
    # The integers are exact; the row scale is the only rounding in fp32.
    exact = fmt.exact_weight(codes, scale, unpack_offset(a.zero_point, a.out_features, a.packing), torch.float32)
    return (exact[..., : a.in_features] * a.row_scale).to(a.dtype)


@torch.library.register_fake("intscale::dequantize_weight")
@takes(DequantizeWeightArguments)
def _dequantize_weight_fake(a: DequantizeWeightArguments) -> Tensor:
    return a.qdata.new_empty((*a.qdata.shape[:-2], a.out_features, a.in_features), dtype=a.dtype)
