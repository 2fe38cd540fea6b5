"""``intscale::w4a8_grouped_linear``: the fused linear layer of a stack of experts, rows sorted by expert.

    acc[p, n] = sum_g scale[e, n, g] * sum_{k in g} (q[e, n, k] - zero_point[e, n, g]) * xq[t, k]   int32, exact
    y[o, n]   = float(acc[p, n]) * token_scale[t] * row_scale[e, n] (+ bias[e, n])        one conversion

for every position ``p`` of the sorted order. Expert ``e`` has the positions ``offsets[e - 1] <= p < offsets[e]``, as in
``torch.nn.functional.grouped_mm``; it may have none. Positions from ``offsets[-1]`` on belong to no expert: zeros.
``t = row_index[p]`` is the row of the activation, by default ``p``: a token that several experts see is quantized once and
never copied. ``o = out_index[p]`` is the row of the output, by default ``p``; it must be a permutation.

The accumulator is the same to the bit on every device, tile and routing. Nothing here waits for a GPU.
Weights are stacks ``[E, N, K]`` in the formats of ``w4a8_linear``, whose page explains the other arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from ..errors import InputError
from .arguments import GroupedArguments, InputGradArguments, form, gradients, operands, schema, takes
from .cpu_gemm import accumulate_expert_cpu
from .dequantize import WEIGHT_OP
from .prepared import on_gpu
from .w4a8_linear import apply_scales, check_operands, reference_accumulate

torch.library.define("intscale::w4a8_grouped_linear", schema(GroupedArguments))
torch.library.define("intscale::w4a8_grouped_input_grad", schema(InputGradArguments))
GROUPED_OP = torch.ops.intscale.w4a8_grouped_linear.default
INPUT_GRAD_OP = torch.ops.intscale.w4a8_grouped_input_grad.default
INDEX_DTYPES = (torch.int32, torch.int64)


def check_grouped_operands(a: GroupedArguments) -> None:
    """Raise ``InputError`` unless the operands have the shapes and dtypes that the schema promises to a kernel."""
    xq, qdata, scale, zero_point = a.xq, a.qdata, a.scale, a.zero_point
    if xq.dim() != 2:
        raise InputError(f"w4a8_grouped: xq has {xq.dim()} dimensions, expected [rows, K].")
    if qdata.dim() != 3 or scale.dim() != 3:
        raise InputError(
            f"w4a8_grouped: qdata has {qdata.dim()} and scale {scale.dim()} dimensions, expected stacks of matrices, 3."
        )
    experts, rows = qdata.shape[0], output_rows(xq, a.row_index)
    check_operands(
        xq, qdata[0], scale[0], a.out_features, a.group_size, a.packing, None if zero_point is None else zero_point[0]
    )
    for name, tensor, shape in (
        ("scale", scale, (experts, *scale.shape[1:])),
        ("zero_point", zero_point, scale.shape),
        ("row_scale", a.row_scale, (experts, a.out_features, 1)),
        ("bias", a.bias, (experts, a.out_features)),
        ("offsets", a.offsets, (experts,)),
        ("token_scale", a.token_scale, (xq.shape[0], 1)),
        ("row_index", a.row_index, (rows,)),
        ("out_index", a.out_index, (rows,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"w4a8_grouped: {name} has shape {tuple(tensor.shape)}, expected {shape}.")
        if tensor is not None and tensor.device != xq.device:
            raise InputError(f"w4a8_grouped: {name} is on {tensor.device}, xq on {xq.device}: move them together.")
    for name, tensor in (("offsets", a.offsets), ("row_index", a.row_index), ("out_index", a.out_index)):
        if tensor is not None and tensor.dtype not in INDEX_DTYPES:
            raise InputError(f"w4a8_grouped: {name} is {tensor.dtype}, expected int32 or int64.")


def output_rows(xq: Tensor, row_index: Optional[Tensor]) -> int:
    """Number of positions, and of rows of the output."""
    return xq.shape[0] if row_index is None else row_index.shape[0]


def expert_ranges(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has positions, with these; reads the offsets on the host."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        end = min(end, rows)
        if end > start:
            yield expert, slice(start, end)
            start = end


def reference_grouped(
    xq: Tensor, qdata: Tensor, scale: Tensor, offsets: Tensor, out_features: int, group_size: int, packing: str,
    row_index: Optional[Tensor] = None, out_index: Optional[Tensor] = None, zero_point: Optional[Tensor] = None,
) -> Tensor:  # fmt: skip
    """The accumulator ``[rows, N]`` in plain PyTorch, int32, any device, exact. Slow; the oracle."""
    x = xq if row_index is None else xq[row_index]
    acc = xq.new_zeros((x.shape[0], out_features), dtype=torch.int32)
    for expert, part in expert_ranges(offsets, x.shape[0]):
        zero = None if zero_point is None else zero_point[expert]
        acc[part] = reference_accumulate(x[part], qdata[expert], scale[expert], out_features, group_size, packing, zero)
    return acc if out_index is None else torch.empty_like(acc).index_copy_(0, out_index.long(), acc)


@torch.library.impl("intscale::w4a8_grouped_linear", "CPU")
@takes(GroupedArguments)
def _grouped_cpu(a: GroupedArguments) -> Tensor:
    check_grouped_operands(a)
    rows = output_rows(a.xq, a.row_index)
    out = a.xq.new_empty((rows, a.out_features), dtype=a.dtype)
    end = 0
    for expert, part in expert_ranges(a.offsets, rows):
        tokens = part if a.row_index is None else a.row_index[part]
        acc = accumulate_expert_cpu(a.xq[tokens], a.qdata, a.scale, expert, *form(a), a.zero_point)
        bias = None if a.bias is None else a.bias[expert]
        y = apply_scales(acc, a.token_scale[tokens], a.row_scale[expert], bias, a.dtype)
        out[part if a.out_index is None else a.out_index[part]] = y
        end = part.stop
    if end < rows:
        out[slice(end, rows) if a.out_index is None else a.out_index[end:]] = 0
    return out


@on_gpu("intscale::w4a8_grouped_linear")
@takes(GroupedArguments)
def grouped_on_gpu(a: GroupedArguments) -> Tensor:
    """``intscale::w4a8_grouped_linear`` on a GPU, without the dispatcher."""
    # Imports Triton, which only GPUs need.
    from .triton_grouped import GroupedForm, grouped_linear_cuda

    check_grouped_operands(a)
    grouped = GroupedForm(*form(a))
    return grouped_linear_cuda(
        *operands(a), a.offsets, grouped, a.dtype, a.row_index, a.out_index, zero_point=a.zero_point
    )


@torch.library.register_fake("intscale::w4a8_grouped_linear")
@takes(GroupedArguments)
def _grouped_fake(a: GroupedArguments) -> Tensor:
    check_grouped_operands(a)
    return a.xq.new_empty((output_rows(a.xq, a.row_index), a.out_features), dtype=a.dtype)


@torch.library.impl("intscale::w4a8_grouped_input_grad", "CompositeExplicitAutograd")
@takes(InputGradArguments)
def _input_grad(a: InputGradArguments) -> Tensor:
    grad = a.grad if a.out_index is None else a.grad[a.out_index]
    grad_input = grad.new_zeros((a.rows, a.in_features))
    for expert, part in expert_ranges(a.offsets, grad.shape[0]):
        weight = WEIGHT_OP(
            *(a.qdata[expert], a.scale[expert], a.row_scale[expert]),
            *(a.out_features, a.in_features, a.group_size, a.packing, grad.dtype),
            None if a.zero_point is None else a.zero_point[expert],
        )
        if a.row_index is None:
            grad_input[part] = grad[part] @ weight
        else:
            grad_input.index_add_(0, a.row_index[part], grad[part] @ weight)
    return grad_input


@torch.library.register_fake("intscale::w4a8_grouped_input_grad")
@takes(InputGradArguments)
def _input_grad_fake(a: InputGradArguments) -> Tensor:
    return a.grad.new_empty((a.rows, a.in_features))


def _save_weight(ctx, inputs, output):
    a = GroupedArguments(*inputs)
    ctx.save_for_backward(a.qdata, a.scale, a.row_scale, a.offsets, a.row_index, a.out_index, a.zero_point)
    ctx.weight_args = (a.xq.shape[0], a.out_features, a.xq.shape[1], a.group_size, a.packing)
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype
    ctx.input_dtype = None if a.ste_input is None else a.ste_input.dtype


def _straight_through(ctx, grad):
    """``grad_x = grad @ W`` of each row's expert; rounding of the activation counts as the identity."""
    qdata, scale, row_scale, offsets, row_index, out_index, zero_point = ctx.saved_tensors
    needed = GroupedArguments(*ctx.needs_input_grad)
    grad_input = grad_bias = None
    if ctx.input_dtype is not None and needed.ste_input:
        weight = (qdata, scale, row_scale, offsets)
        indices = (row_index, out_index, zero_point)
        grad_input = INPUT_GRAD_OP(grad, *weight, *ctx.weight_args, *indices).to(ctx.input_dtype)
    if ctx.bias_dtype is not None and needed.bias:
        positions = torch.arange(grad.shape[0], device=grad.device)
        expert = torch.searchsorted(offsets.long(), positions, right=True)  # E for rows that belong to none
        sums = grad.new_zeros((offsets.shape[0] + 1, grad.shape[1]), dtype=torch.float32)
        ordered = grad if out_index is None else grad[out_index]
        grad_bias = sums.index_add(0, expert, ordered.float())[:-1].to(ctx.bias_dtype)
    return gradients(GroupedArguments, bias=grad_bias, ste_input=grad_input)


torch.library.register_autograd("intscale::w4a8_grouped_linear", _straight_through, setup_context=_save_weight)
