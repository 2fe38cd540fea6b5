"""Products with an ``IntScaleTensor`` run quantized, however they are written. Importing this module registers them."""

from __future__ import annotations

import torch

from .intscale_tensor import IntScaleTensor
from .linear import linear
from .operators import refuse
from .product_forms import einsum_linear, tensordot_linear

aten = torch.ops.aten
LINEAR_MEND = "write F.linear(x, weight), leave the weight out (filter_fn)"
implements = IntScaleTensor.implements
implements_torch_function = IntScaleTensor.implements_torch_function


@implements(aten.linear.default)
@implements_torch_function(torch.nn.functional.linear)
def _(func, types, args, kwargs):
    x, weight, bias = (
        *args,
        *(kwargs[name] for name in ("input", "weight", "bias")[len(args) :] if name in kwargs),
        None,
    )[:3]
    if not isinstance(weight, IntScaleTensor) or isinstance(x, IntScaleTensor):
        raise refuse("linear takes a quantized weight and a plain activation", "dequantize the other operand")
    return linear(x, weight, bias)


def _operands(args, kwargs, *names):
    """Operands of a product, positional or by name; ``out=`` is refused rather than ignored."""
    if kwargs.get("out") is not None:
        raise refuse("a product with out=", "use the result that it returns")
    return (*args, *(kwargs[name] for name in names if name in kwargs))


def _matmul(x, weight, bias=None):
    if isinstance(x, IntScaleTensor) or not isinstance(weight, IntScaleTensor):
        raise refuse("only the right operand of a product may be a quantized weight", "write x @ weight.t()")
    if not weight.transposed:
        mend = (
            "write x @ weight.t(), leave a weight that is used in both directions out of quantize_ (filter_fn), and quantized "
            "weights out of what torch.func differentiates"
        )
        raise refuse("x @ weight would reduce over the output dimension", mend)
    return linear(x, weight.transpose(-2, -1), bias)


@implements([aten.mm.default, aten.matmul.default])
@implements_torch_function(
    [torch.matmul, torch.mm, torch.linalg.matmul, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__]
)
def _(func, types, args, kwargs):
    return _matmul(*_operands(args, kwargs, "input", "other", "mat2"))


@implements_torch_function(torch.Tensor.__rmatmul__)
def _(func, types, args, kwargs):
    weight, x = _operands(args, kwargs, "self", "other")
    return _matmul(x, weight)


@implements(aten.addmm.default)
@implements_torch_function([torch.addmm, torch.Tensor.addmm])
def _(func, types, args, kwargs):
    bias, x, weight = _operands(args, kwargs, "input", "mat1", "mat2")[:3]
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        raise refuse("addmm with beta or alpha other than 1", "scale its result instead")
    # A bias vector goes into the product, so that it is added before the one rounding, as in a compiled graph.
    is_vector = isinstance(weight, IntScaleTensor) and tuple(bias.shape) == (weight.shape[-1],)
    return _matmul(x, weight, bias) if is_vector else _matmul(x, weight) + bias


def _spelled(*functions):
    """Functions and the operators of aten that they call."""
    packets = [getattr(aten, function.__name__) for function in functions]
    return [*functions, *packets, *(packet.default for packet in packets)]


@implements_torch_function([*_spelled(torch.inner), torch.Tensor.inner])
def _(func, types, args, kwargs):
    x, weight = _operands(args, kwargs, "input", "self", "other")[:2]
    if isinstance(x, IntScaleTensor) or weight.dim() != 2:
        raise refuse("inner takes a plain activation and a quantized matrix", "write F.linear(x, weight)")
    return linear(x, weight)


@implements_torch_function(_spelled(torch.tensordot))
def _(func, types, args, kwargs):
    x, weight, *dims = _operands(args, kwargs, "a", "self", "b", "other", "dims", "dims_self", "dims_other")
    kept_nk = None
    if isinstance(weight, IntScaleTensor) and not isinstance(x, IntScaleTensor) and weight.dim() == 2 and dims:
        kept_nk = tensordot_linear(dims[0] if len(dims) == 1 else tuple(dims[:2]), x.dim())
    if kept_nk is None:
        raise refuse(f"tensordot over {dims} is no linear layer", LINEAR_MEND)
    return _matmul(x, weight.t() if kept_nk else weight)


@implements_torch_function(_spelled(torch.einsum))
def _(func, types, args, kwargs):
    equation, *operands = _operands(args, kwargs, "equation", "tensors")
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    place = next((i for i, operand in enumerate(operands) if isinstance(operand, IntScaleTensor)), 0)
    kept_nk = einsum_linear(equation, place) if len(operands) == 2 else None
    if kept_nk is None or operands[place].dim() != 2:
        raise refuse(f"einsum {equation!r} is no linear layer", LINEAR_MEND)
    x, weight = operands[1 - place], operands[place]
    return _matmul(x, weight.t() if kept_nk else weight)
