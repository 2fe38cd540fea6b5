"""Mixtures of experts as functions: grouped and batched products with stacks of quantized weights, and the ``intscale``
implementation of transformers' experts interface.

    model.set_experts_implementation("intscale")        # transformers 5: eager calls without copies of rows

It is optional: ``grouped_mm`` (the default of transformers), ``batched_mm`` and ``eager`` run on quantized experts too.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedOpError
from ..integrations.torch_state import differentiates
from ..kernels.arguments import GroupedArguments
from ..kernels.quantize_per_token import check_activation
from ..kernels.w4a8_grouped import GROUPED_OP
from ..ops import KERNEL_ABI
from .eager import eager_grouped
from .intscale_tensor import IntScaleTensor
from .linear import quantize_activation

IMPLEMENTATION = "intscale"


def _check_grouped(x: Tensor, weight: IntScaleTensor) -> None:
    """Raise unless ``x`` ``[tokens, K]`` and a stack ``[E, N, K]`` go together."""
    check_activation(x)
    if weight.dim() != 3 or weight.transposed:
        raise InputError(f"grouped_linear needs a stack [E, N, K], not a weight of shape {tuple(weight.shape)}.")
    if x.dim() != 2 or x.shape[-1] != weight.in_features:
        raise InputError(
            f"the activation has shape {tuple(x.shape)}, expected [rows, {weight.in_features}] for {weight!r}."
        )
    if differentiates():
        raise UnsupportedOpError(
            "IntScaleTensor: torch.func's grad, vjp and jvp are not defined through experts; use torch.autograd.grad."
        )


def grouped_linear(
    x: Tensor,
    weight: IntScaleTensor,
    offsets: Tensor,
    bias: Optional[Tensor] = None,
    row_index: Optional[Tensor] = None,
    out_index: Optional[Tensor] = None,
) -> Tensor:
    """Linear layers of several experts on rows that are sorted by expert, activations quantized to int8.

    Per token, or with the static scale of the expert: a token that several experts see is then quantized for each of them.

    Args:
        x: fp32, bf16 or fp16 ``[tokens, K]``.
        weight: stack ``[E, N, K]``, not transposed.
        offsets: int32 or int64 ``[E]``: expert ``e`` has the sorted positions from ``offsets[e - 1]`` to ``offsets[e]``.
            Positions from ``offsets[-1]`` on give zeros.
        bias: ``[E, N]`` or None.
        row_index: row of ``x`` for each sorted position, int32 or int64 ``[rows]``; by default ``x`` is sorted itself.
        out_index: row of the result for each sorted position, a permutation; by default the result is sorted.

    Returns:
        ``[rows, N]`` in the dtype of ``x``. The gradient of ``x`` goes straight through the quantizer.

    Raises:
        InputError: wrong dtype, device or shape.
    """
    _check_grouped(x, weight)
    static = weight.activation_scale
    if static is not None:
        x, row_index = (x, None) if row_index is None else (x[row_index], None)
        static = scale_of_positions(static, offsets, x.shape[0])
    if not torch.compiler.is_compiling():
        y = eager_grouped(x, weight, static, offsets, bias, row_index, out_index)
        if y is not None:
            return y
    xq, token_scale, watched = quantize_activation(x, weight.rotation, static)
    return GROUPED_OP(
        *GroupedArguments(
            xq=xq,
            token_scale=token_scale,
            qdata=weight.qdata,
            scale=weight.scale,
            row_scale=weight.per_tensor_scale,
            bias=bias,
            offsets=offsets,
            out_features=weight.out_features,
            group_size=weight.group_size,
            scale_bits=weight.scale_bits,
            packing=weight.packing_format,
            dtype=x.dtype,
            abi=KERNEL_ABI,
            row_index=row_index,
            out_index=out_index,
            ste_input=watched,
            zero_point=weight.zero_point,
        )
    )


def scale_of_positions(static: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Activation scale of every sorted position, fp32 ``[rows, 1]``, from those of the experts, ``[E, 1, 1]``.

    Positions behind the last expert take its scale; their results are zeros.
    """
    positions = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, positions, right=True).clamp(max=static.shape[0] - 1)
    return static.reshape(-1, 1).index_select(0, expert)


def sort_by_expert(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sorted order of ``expert_ids`` ``[S]`` and offsets int32 ``[experts]``; ids from ``experts`` on come last.

    Nothing here waits for a GPU.
    """
    ids, order = torch.sort(expert_ids)
    numbers = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    return order, torch.searchsorted(ids, numbers, right=True, out_int32=True)


def batched_linear(x: Tensor, stack: IntScaleTensor, expert_ids: Optional[Tensor] = None) -> Tensor:
    """``x[s] @ stack[expert_ids[s]].T`` for every ``s`` without a copy of the chosen weights.

    Args:
        x: ``[S, M, K]``.
        stack: ``[E, N, K]``, not transposed.
        expert_ids: integers ``[S]`` below ``E``; by default 0 to ``S - 1``, with ``S`` equal to ``E``.

    Returns:
        ``[S, M, N]`` in the dtype of ``x``.
    """
    batch, rows, features = x.shape
    flat = x.reshape(batch * rows, features)
    if expert_ids is None:
        if batch != stack.shape[0]:
            raise InputError(f"a batch of {batch} matrices meets a stack of {stack.shape[0]} experts.")
        offsets = torch.arange(1, batch + 1, device=x.device, dtype=torch.int32) * rows
        return grouped_linear(flat, stack, offsets).view(batch, rows, -1)
    order, offsets = sort_by_expert(expert_ids, stack.shape[0])
    if rows != 1:
        order = (order.unsqueeze(1) * rows + torch.arange(rows, device=x.device)).flatten()
        offsets = offsets * rows
    return grouped_linear(flat, stack, offsets, None, order, order).view(batch, rows, -1)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts implementation ``"intscale"``: rows are gathered and scattered inside the products.

    Args:
        module: an experts module of transformers' experts interface. Where its weights are not quantized, and under
            ``torch.compile``, where a pass does the same to that form, it runs as ``grouped_mm``.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: chosen experts, int64 ``[tokens, k]``; numbers from ``num_experts`` on belong to other ranks.
        top_k_weights: ``[tokens, k]``.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = (_stack(getattr(module, name)) for name in (up_name, "down_proj"))
    if up is None or down is None or torch.compiler.is_compiling():
        # Slow to import.
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    tokens, chosen = top_k_index.shape
    order, offsets = sort_by_expert(top_k_index.reshape(-1), up.shape[0])
    up_bias, down_bias = (
        getattr(module, f"{name}_bias") if module.has_bias else None for name in (up_name, "down_proj")
    )
    y = grouped_linear(hidden_states, up, offsets, up_bias, row_index=order // chosen)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = grouped_linear(y, down, offsets, down_bias, out_index=order)
    if getattr(module, "has_post_expert_norm", False):  # transformers 5.17 has no such attribute
        y = module.post_expert_norm(y)
    weighted = y * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)


def _stack(weight: Tensor) -> Optional[IntScaleTensor]:
    """The stack ``[E, N, K]`` behind a quantized parameter in either orientation, or None."""
    if not isinstance(weight, IntScaleTensor):
        return None
    return weight.transpose(-2, -1) if weight.transposed else weight  # type: ignore[return-value]
