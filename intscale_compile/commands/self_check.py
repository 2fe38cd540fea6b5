"""A tiny W4A8 linear, run on this machine and compared with what the format says, bit for bit."""

from __future__ import annotations

from typing import Union

import torch
from torch import nn
from torchao.quantization import quantize_

from ..config import IntScaleConfig
from ..errors import CompileError
from ..kernels.quantize_per_token import OP as QUANTIZE_OP
from ..kernels.w4a8_linear import ACCUMULATE_OP, reference_accumulate
from ..ops import KERNEL_ABI
from ..tensors.intscale_tensor import IntScaleTensor

SHAPE, TOKENS = (192, 256), 5


def check_accumulator(device: Union[str, torch.device] = "cpu") -> None:
    """Compare the int32 accumulator of a random layer on a device with the one computed in float64, which is exact.

    Raises:
        CompileError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    weight = IntScaleTensor.from_hp(torch.randn(SHAPE, generator=generator).to(device))
    xq, _ = QUANTIZE_OP(torch.randn(TOKENS, SHAPE[1], generator=generator).to(device))
    form = (weight.out_features, weight.group_size)
    found = ACCUMULATE_OP(xq, weight.qdata, weight.scale, *form, weight.scale_bits, weight.packing_format, KERNEL_ABI)
    wanted = reference_accumulate(xq.cpu(), weight.qdata.cpu(), weight.scale.cpu(), *form, weight.packing_format)
    if not torch.equal(found.cpu(), wanted):
        wrong = int((found.cpu() != wanted).sum())
        raise CompileError(f"{wrong} of {wanted.numel()} integer sums are wrong on {device}: report this machine.")


def check_compiled(device: Union[str, torch.device] = "cpu") -> None:
    """Compile a quantized layer with the backend and compare it with the same layer in eager mode.

    Raises:
        CompileError: they differ by more than the rounding of the float epilogue.
    """
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(SHAPE, generator=generator))
    quantize_(layer.to(device), IntScaleConfig())
    x = torch.randn(TOKENS, SHAPE[1], generator=generator).to(device)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = layer(x)
        found = torch.compile(layer, backend="intscale", fullgraph=True)(x)
    largest = float(((found - wanted).abs() / wanted.abs().clamp(min=1e-6)).max())
    if not largest <= 2 * torch.finfo(torch.float32).eps:
        raise CompileError(f"the compiled layer differs from the eager one by {largest:.1e} on {device}: report this.")


def check_linear(device: Union[str, torch.device] = "cpu", *, compiled: bool = True) -> None:
    """Both checks on a device: integers bit for bit, and with ``compiled`` the compiled layer.

    Raises:
        CompileError: one of them fails.
    """
    check_accumulator(device)
    if compiled:
        check_compiled(device)
