"""``intscale::w4a8_linear`` and its integer half ``intscale::w4a8_accumulate``: the fused linear layer.

    acc[m, n] = sum_g scale[n, g] * sum_{k in g} (q[n, k] - zero_point[n, g]) * xq[m, k]  int32, exact
    y[m, n]   = float(acc[m, n]) * token_scale[m] * row_scale[n] (+ bias[n])             one conversion

The accumulator is the same to the bit on every device, tile and batch. Weights are 2-D; ``qdata`` is uint8 (packed int4)
or int8 (8-bit weights). See ``format`` for both packings. ``scale_bits`` bounds the group scales: up to 4 they are folded
into the int8 weight. ``zero_point`` is None or int8 like ``scale``, for 4-bit weights; scales of 4 bits do not fold then. An
int16 one is an offset in units of the row scale: ``acc = sum_g (scale * sum q * xq - zero_point * sum xq)``.
``abi`` is :data:`~intscale_compile.kernels.abi.KERNEL_ABI`; it only separates cache entries.
``ste_input`` is the activation before quantization: unused in the forward pass, it receives the straight-through gradient.
``overlap`` lets a GPU kernel begin to read the weight before the kernels launched before it have ended. The passes set it:
in a compiled graph the activation is quantized by a kernel of that graph, so whoever wrote the weight has long ended.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .. import format as fmt
from ..errors import InputError
from .arguments import (
    AccumulateArguments,
    LinearArguments,
    form,
    gradients,
    operands,
    schema,
    stored,
    takes,
)
from .cpu_gemm import accumulate_cpu
from .dequantize import WEIGHT_OP, unpack_offset, unpack_weight
from .prepared import on_gpu

torch.library.define("intscale::w4a8_accumulate", schema(AccumulateArguments))
torch.library.define("intscale::w4a8_linear", schema(LinearArguments))
ACCUMULATE_OP = torch.ops.intscale.w4a8_accumulate.default
LINEAR_OP = torch.ops.intscale.w4a8_linear.default
FOLD_SCALE_BITS = 4  # |q * scale| <= 8 * 15 fits int8


def check_operands(
    xq: Tensor, qdata: Tensor, scale: Tensor, out_features: int, group_size: int, packing: str,
    zero_point: Optional[Tensor] = None,
) -> None:  # fmt: skip
    """Raise ``InputError`` unless the operands have the shapes and dtypes that the schema promises to a kernel."""
    if xq.dtype != torch.int8:
        raise InputError(f"w4a8: xq is {xq.dtype}, expected int8 from quantize_per_token.")
    if qdata.dtype not in (torch.uint8, torch.int8) or qdata.dim() != 2:
        raise InputError(f"w4a8: qdata is {qdata.dtype} with {qdata.dim()} dimensions, expected 2-D uint8 or int8.")
    padded = qdata.shape[-1] * (2 if qdata.dtype == torch.uint8 else 1)
    if fmt.padded_in_features(xq.shape[-1], group_size) != padded:
        raise InputError(
            f"w4a8: the activation has {xq.shape[-1]} features but the weight is stored for {padded} (with padding)."
        )
    rows = fmt.padded_out_features(out_features) if packing == "tiled" else out_features
    groups = fmt.num_groups(padded, group_size)
    if qdata.shape[0] != rows or tuple(scale.shape) != (rows, groups):
        raise InputError(
            f"w4a8: qdata {tuple(qdata.shape)} and scale {tuple(scale.shape)} do not describe {out_features} rows "
            f"of {groups} groups in {packing} packing."
        )
    if zero_point is not None and (
        zero_point.dtype not in (torch.int8, torch.int16)
        or zero_point.shape != scale.shape
        or qdata.dtype != torch.uint8
    ):
        raise InputError(
            f"w4a8: zero_point is {zero_point.dtype} {tuple(zero_point.shape)} for {qdata.dtype} codes, expected int8 "
            f"or int16 {tuple(scale.shape)} and packed 4-bit codes."
        )
    if zero_point is not None and zero_point.device != xq.device:
        raise InputError(f"w4a8: activation on {xq.device}, zero_point on {zero_point.device}: move them together.")
    if not xq.device == qdata.device == scale.device:
        raise InputError(
            f"w4a8: activation on {xq.device}, weight on {qdata.device}, scale on {scale.device}: move them together."
        )


def reference_accumulate(
    xq: Tensor, qdata: Tensor, scale: Tensor, out_features: int, group_size: int, packing: str,
    zero_point: Optional[Tensor] = None,
) -> Tensor:  # fmt: skip
    """The accumulator in plain PyTorch, any device, exact: float64 holds every integer below 2**53. Slow; the oracle."""
    codes, scale = unpack_weight(qdata, scale, out_features, group_size, packing, zero_point)
    weight = fmt.exact_weight(codes, scale, unpack_offset(zero_point, out_features, packing), torch.float64)
    return (xq.double() @ weight[:, : xq.shape[-1]].t()).to(torch.int32)


def apply_scales(
    acc: Tensor, token_scale: Tensor, row_scale: Tensor, bias: Optional[Tensor], dtype: torch.dtype
) -> Tensor:
    """The float epilogue: ``float(acc) * token_scale * row_scale + bias`` in fp32, rounded once to ``dtype``."""
    y = acc.to(torch.float32) * token_scale * row_scale.view(-1)
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


@torch.library.impl("intscale::w4a8_accumulate", "CPU")
@takes(AccumulateArguments)
def _accumulate_cpu(a: AccumulateArguments) -> Tensor:
    check_operands(a.xq, *stored(a))
    return accumulate_cpu(a.xq, a.qdata, a.scale, *form(a), a.zero_point)


@on_gpu("intscale::w4a8_accumulate")
@takes(AccumulateArguments)
def _accumulate_cuda(a: AccumulateArguments) -> Tensor:
    # Imports Triton, which only GPUs need.
    from .triton_gemm import accumulate_cuda

    check_operands(a.xq, *stored(a))
    return accumulate_cuda(a.xq, a.qdata, a.scale, *form(a), zero_point=a.zero_point)


@torch.library.register_fake("intscale::w4a8_accumulate")
@takes(AccumulateArguments)
def _accumulate_fake(a: AccumulateArguments) -> Tensor:
    check_operands(a.xq, *stored(a))
    return a.xq.new_empty((*a.xq.shape[:-1], a.out_features), dtype=torch.int32)


@torch.library.impl("intscale::w4a8_linear", "CPU")
@takes(LinearArguments)
def _linear_cpu(a: LinearArguments) -> Tensor:
    check_operands(a.xq, *stored(a))
    acc = accumulate_cpu(a.xq, a.qdata, a.scale, *form(a), a.zero_point)
    return apply_scales(acc, a.token_scale, a.row_scale, a.bias, a.dtype)


@on_gpu("intscale::w4a8_linear")
@takes(LinearArguments)
def linear_on_gpu(a: LinearArguments) -> Tensor:
    """``intscale::w4a8_linear`` on a GPU, without the dispatcher."""
    # Imports Triton, which only GPUs need.
    from .triton_gemm import linear_cuda

    check_operands(a.xq, *stored(a))
    return linear_cuda(*operands(a), *form(a), a.dtype, overlap=a.overlap, zero_point=a.zero_point)


@torch.library.register_fake("intscale::w4a8_linear")
@takes(LinearArguments)
def _linear_fake(a: LinearArguments) -> Tensor:
    check_operands(a.xq, *stored(a))
    return a.xq.new_empty((*a.xq.shape[:-1], a.out_features), dtype=a.dtype)


def _save_weight(ctx, inputs, output):
    a = LinearArguments(*inputs)
    ctx.save_for_backward(a.qdata, a.scale, a.row_scale, a.zero_point)
    ctx.weight_args = (a.out_features, a.xq.shape[-1], a.group_size, a.packing)
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype
    ctx.input_dtype = None if a.ste_input is None else a.ste_input.dtype


def _straight_through(ctx, grad):
    """``grad_x = grad @ W`` with the dequantized weight; rounding of the activation counts as the identity."""
    needed = LinearArguments(*ctx.needs_input_grad)
    grad_input = grad_bias = None
    if ctx.input_dtype is not None and needed.ste_input:
        *parts, zero_point = ctx.saved_tensors
        weight = WEIGHT_OP(*parts, *ctx.weight_args, grad.dtype, zero_point)
        grad_input = (grad @ weight).to(ctx.input_dtype)
    if ctx.bias_dtype is not None and needed.bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return gradients(LinearArguments, bias=grad_bias, ste_input=grad_input)


torch.library.register_autograd("intscale::w4a8_linear", _straight_through, setup_context=_save_weight)
