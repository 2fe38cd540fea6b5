"""Quantizing one weight as a calibration's options say: scales, codes, and the tensor that holds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..config import IntScaleConfig
from ..errors import CalibrationError
from ..tensors.input_rotation import hand_over_rotation
from ..tensors.intscale_tensor import IntScaleTensor
from ..tensors.selection import show_quantized
from ..tensors.weight_checks import check_weight
from .clipping import choose_steps, code_range, into_groups, learn_steps, nearest_integer_steps, on_integer_grid
from .config import CalibrationConfig
from .gptq import compensated, gptq_codes

IMPORTANCE_FLOOR = 0.01  # of the mean: columns that were never active still count a little


@dataclass
class Codes:
    """A quantized weight before its scales become integers.

    Attributes:
        codes: int8 ``[..., N, K]``.
        steps: fp32 ``[..., N, G]``, one float scale per group of the stored columns, padding groups left out.
        config: format.
        dtype: of the original weight.
        activation_scale: the static scale of the activation; None: one scale per token.
        rotation: size of the online Hadamard transform of the activation, 0: none.
    """

    codes: Tensor
    steps: Tensor
    config: IntScaleConfig
    dtype: torch.dtype
    activation_scale: Optional[float] = None
    rotation: int = 0

    def dequantize(self) -> Tensor:
        """fp32 ``[..., N, K]``."""
        columns = self.codes.shape[-1]
        size = columns if self.config.effective_group_size == -1 else self.config.group_size
        return self.codes * self.steps.repeat_interleave(size, dim=-1)[..., :columns]

    def tensor(self, name: str, config: Optional[IntScaleConfig] = None) -> IntScaleTensor:
        """The weight with integer group scales, codes as they are; ``config`` may say another form of the scales.

        Raises:
            OverflowProofError: the accumulator of a row cannot be proved free of overflow.
        """
        config = self.config if config is None else config
        tensor = IntScaleTensor.from_codes(
            self.codes, self.steps, group_size=config.effective_group_size, scale_bits=config.scale_bits,
            amplifier=config.amplifier, weight_bits=config.weight_bits, dtype=self.dtype,
            packing_format=config.packing_format, name=name,
        )  # fmt: skip
        if self.activation_scale is not None:
            shape = (*self.codes.shape[:-2], 1, 1)
            static = torch.full(shape, self.activation_scale, dtype=torch.float32, device=self.codes.device)
            tensor = tensor.replaced(act_pre_scale=static)
        return tensor.replaced(rotation=self.rotation) if self.rotation else tensor


class FloatScaleWeight(torch.Tensor):
    """A fake-quantized weight with float scales: products with it quantize their other operand to int8 per token.

    ``source`` keeps the codes and float scales. Slices (one expert of a stack) are weights of the same kind.
    """

    source: Any = None
    kept_transposed = False
    activation_scale: Optional[float] = None

    @classmethod
    def of(cls, codes: Codes, transposed: bool) -> FloatScaleWeight:
        """The weight of ``codes`` in their original dtype; ``transposed``: as the module keeps it."""
        dense = codes.dequantize().to(codes.dtype)
        weight = (dense.mT.contiguous() if transposed else dense).as_subclass(cls)
        weight.source, weight.kept_transposed, weight.activation_scale = codes, transposed, codes.activation_scale
        return weight

    def with_row_factors(self, factors: Tensor) -> FloatScaleWeight:
        """The weight with its rows multiplied by ``factors``, ``[..., N, 1]`` (``[..., 1, N]`` where kept transposed)."""
        rows = factors.mT if self.kept_transposed else factors
        codes = dataclasses.replace(self.source, steps=self.source.steps * rows)
        return FloatScaleWeight.of(codes, self.kept_transposed)

    def __deepcopy__(self, memo) -> Tensor:
        return memo.setdefault(id(self), frozen(FloatScaleWeight.of(self.source, self.kept_transposed)))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).rsplit(".", 1)[-1]
        if name in _PRODUCTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*_quantized(cls, name, args), **kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if name not in _PARTS:  # values, and no weight any more
            with torch._C.DisableTorchFunctionSubclass():
                return tree_map(
                    lambda r: r.as_subclass(Tensor) if isinstance(r, cls) and r.source is None else r, result
                )
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, cls) and part.source is None and isinstance(args[0], cls):
                part.activation_scale = args[0].activation_scale
        return result


# Products by the name of the function, with the place of their left operand; the right one follows.
_PRODUCTS = dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm", "grouped_mm", "_grouped_mm"), 0)
_PRODUCTS |= {"grouped_mm_fallback": 0, "addmm": 1, "baddbmm": 1}
# What gives a part of a weight, or the weight in another shape.
_PARTS = {
    "__getitem__", "__get__", "select", "index_select", "narrow", "unbind", "chunk", "split", "transpose", "t", "permute", "view",
    "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "to", "detach", "clone", "requires_grad_",
}  # fmt: skip


def _quantized(cls: Any, name: str, args: tuple) -> tuple:
    """Positional arguments of a product with a weight, the other operand quantized.

    Raises:
        CalibrationError: the operands are given by name, or both are weights.
    """
    place = _PRODUCTS[name]
    if len(args) < place + 2 or isinstance(args[place], cls) == isinstance(args[place + 1], cls):
        raise CalibrationError(
            f"scales='float' cannot follow {name} of a quantized weight with operands by name, or with another weight: pass an "
            "activation and a weight in their places, or calibrate with integer scales."
        )
    left, right = args[place : place + 2]
    if isinstance(right, cls):
        left = fake_quantize(left, right.activation_scale)
    elif name == "linear" or right.dim() == 1:
        right = fake_quantize(right, left.activation_scale)
    else:  # as batched experts do it: weight @ column
        right = fake_quantize(right.mT, left.activation_scale).mT
    return (*args[:place], left, right, *args[place + 2 :])


def fake_quantize(x: Tensor, static: Optional[float] = None) -> Tensor:
    """Round an activation to the 255 levels of int8 and back: one scale per token, or a static one."""
    scale = static if static is not None else x.abs().amax(-1, keepdim=True).float().clamp(min=2.0**-126) / 127
    return ((x / scale).round().clamp(-127, 127) * scale).to(x.dtype)


def solve(
    weight: Tensor,
    config: IntScaleConfig,
    options: CalibrationConfig,
    hessian: Optional[Tensor],
    name: str,
    lost: Optional[Tensor] = None,
    learned: Optional[Tensor] = None,
) -> Codes:
    """Choose scales and codes of a weight.

    Args:
        weight: floating point ``[N, K]`` or ``[E, N, K]``.
        config: format.
        options: algorithm.
        hessian: fp32 ``[K, K]`` or ``[E, K, K]``, sums of ``x x^T``; None where the options need none.
        name: named in errors.
        lost: fp32 ``[K, K]``, sums of ``(original x - x) x^T``; codes are then chosen for the weight that comes closest
            to the original output on the inputs as they are now, ``W + W lost H^-1``.
        learned: steps that were learned for it, fp32 ``[..., N, G]``; None: they are chosen here.

    Raises:
        WeightError: the weight cannot be quantized.
        CalibrationError: the Hessian cannot be factored.
    """
    check_weight(weight, name)
    if weight.dim() == 3:
        parts = [
            solve(
                expert, config, options, None if hessian is None else hessian[e], f"{name}[{e}]",
                learned=None if learned is None else learned[e],
            )
            for e, expert in enumerate(weight)
        ]  # fmt: skip
        codes, steps = torch.stack([p.codes for p in parts]), torch.stack([p.steps for p in parts])
        return Codes(codes, steps, config, weight.dtype)
    columns, size = weight.shape[-1], config.effective_group_size
    extra = 0 if size == -1 else -columns % size
    wide = F.pad(weight.detach().float(), (0, extra))
    if hessian is not None:
        hessian = F.pad(hessian, (0, extra, 0, extra))
    if hessian is not None and lost is not None:
        wide = compensated(wide, hessian, F.pad(lost, (0, extra, 0, extra)), options.damping)
    integer = options.scales == "integer" and on_integer_grid(config)
    importance = None if hessian is None or options.clipping == "none" else importance_of(hessian)
    steps = choose_steps(wide, config, importance, integer=integer) if learned is None else learned
    if learned is None and options.clipping == "learned" and config.weight_bits == 4 and hessian is not None:
        learned = steps = learn_steps(wide, steps, hessian, config)
    if learned is not None and integer and hessian is not None:
        steps = nearest_integer_steps(wide, steps, config, importance_of(hessian))
    return Codes(_round(wide, steps, config, options, hessian)[:, :columns], steps, config, weight.dtype)


def importance_of(hessian: Tensor) -> Tensor:
    """What the squared error of each column counts: its mean square activation, relative to the mean of all columns."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=2.0**-126)
    return diagonal / mean + IMPORTANCE_FLOOR


def _round(
    weight: Tensor, steps: Tensor, config: IntScaleConfig, options: CalibrationConfig, hessian: Optional[Tensor]
) -> Tensor:
    low, high = code_range(config)
    if options.rounding == "nearest" or hessian is None:
        groups = into_groups(weight, config)
        return (groups / steps.unsqueeze(-1)).round_().clamp_(low, high).flatten(-2).to(torch.int8)
    return gptq_codes(
        weight, steps, hessian, act_order=options.act_order, damping=options.damping, sweeps=options.sweeps,
        code_range=(low, high),
    )  # fmt: skip


def frozen(tensor: Tensor) -> nn.Parameter:
    """``tensor`` as a parameter without gradient."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    if isinstance(tensor, FloatScaleWeight):  # nn.Parameter detaches, which drops what the weight carries
        for name in ("source", "kept_transposed", "activation_scale"):
            setattr(parameter, name, getattr(tensor, name))
    return parameter


def set_integer(module: nn.Module, parameter: str, tensor: Tensor) -> None:
    """Give a module a weight with integer scales, and a linear layer its description."""
    setattr(module, parameter, frozen(tensor))
    hand_over_rotation(module)
    show_quantized(module)
