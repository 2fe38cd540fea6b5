"""``intscale::w4a8_gated_linear``: a gate and an up projection with the activation between them, as one op.

    y[m, n]   = float(acc[m, n]) * token_scale[m] * row_scale[n] (+ bias[n])              fp32, acc as in ``w4a8_linear``
    out[m, i] = act(y[m, i]) * y[m, I + i]                                                fp32, rounded once

The weight ``[2 I, K]`` is the gate weight and below it the up weight, stored as any other. Twice as many values would leave
an ordinary linear only to be read again by the kernel that multiplies them. The other arguments are those of
``w4a8_linear``; ``out_features`` is ``2 I``. There is no gradient: the passes emit the op where nothing watches.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..errors import InputError
from .arguments import GatedArguments, form, operands, schema, stored, takes
from .cpu_gemm import accumulate_cpu
from .prepared import on_gpu
from .w4a8_linear import apply_scales, check_operands, reference_accumulate

torch.library.define("intscale::w4a8_gated_linear", schema(GatedArguments))
GATED_OP = torch.ops.intscale.w4a8_gated_linear.default
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def check_gated(activation: str, out_features: int) -> None:
    """Raise ``InputError`` unless the activation is known and the rows are two equal halves."""
    if activation not in ACTIVATIONS:
        raise InputError(f"w4a8_gated: activation {activation!r} is not one of {ACTIVATIONS}.")
    if out_features % 2:
        raise InputError(f"w4a8_gated: {out_features} output features are not a gate and an up half of equal size.")


def gate(y: Tensor, activation: str) -> Tensor:
    """``act(y[..., :I]) * y[..., I:]`` of fp32 ``[..., 2 I]``, in fp32.

    The tanh form of GELU is computed as ``x / (1 + exp(-2 u))``, the same function: ``1 + tanh(u)`` loses the digits of
    negative ``x``.
    """
    x, up = y.chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(x) * up
    if activation == "gelu":
        return torch.nn.functional.gelu(x) * up
    return x / (1.0 + torch.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))) * up


def reference_gated(
    xq: Tensor, token_scale: Tensor, qdata: Tensor, scale: Tensor, row_scale: Tensor, bias: Optional[Tensor],
    activation: str, out_features: int, group_size: int, packing: str, dtype: torch.dtype,
    zero_point: Optional[Tensor] = None,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch, any device, ``[..., I]``. Slow; the oracle."""
    acc = reference_accumulate(xq, qdata, scale, out_features, group_size, packing, zero_point)
    return gate(apply_scales(acc, token_scale, row_scale, bias, torch.float32), activation).to(dtype)


@torch.library.impl("intscale::w4a8_gated_linear", "CPU")
@takes(GatedArguments)
def _gated_cpu(a: GatedArguments) -> Tensor:
    check_operands(a.xq, *stored(a))
    check_gated(a.activation, a.out_features)
    acc = accumulate_cpu(a.xq, a.qdata, a.scale, *form(a), a.zero_point)
    return gate(apply_scales(acc, a.token_scale, a.row_scale, a.bias, torch.float32), a.activation).to(a.dtype)


@on_gpu("intscale::w4a8_gated_linear")
@takes(GatedArguments)
def _gated_cuda(a: GatedArguments) -> Tensor:
    # Imports Triton, which only GPUs need.
    from .triton_gated import gated_linear_cuda

    check_operands(a.xq, *stored(a))
    check_gated(a.activation, a.out_features)
    return gated_linear_cuda(*operands(a), a.activation, *form(a), a.dtype, overlap=a.overlap, zero_point=a.zero_point)


@torch.library.register_fake("intscale::w4a8_gated_linear")
@takes(GatedArguments)
def _gated_fake(a: GatedArguments) -> Tensor:
    check_operands(a.xq, *stored(a))
    check_gated(a.activation, a.out_features)
    return a.xq.new_empty((*a.xq.shape[:-1], a.out_features // 2), dtype=a.dtype)
