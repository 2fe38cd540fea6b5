"""Integers that a weight becomes in an integer-only graph, as recipes of packed inputs: made anew when the weight changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, fx

from ...config import IntScaleConfig
from ...errors import WeightError
from ...kernels.integer.arithmetic import FRACTION, dyadic_of, exponent
from ...kernels.integer.pointwise import rope_table
from ...tensors.intscale_tensor import IntScaleTensor
from ..base import GraphRewrite
from ..kept import remember
from ..match import WeightFinder
from ..packed_weights import ConcatenatedBias, Packed, WeightSource

LARGEST_ROW_SCALE = 32.0  # above, the shift of a linear's epilogue could be less than one
LARGEST_GAMMA = 2.0**11
OUTPUT_CONFIG = IntScaleConfig(weight_bits=8, group_size=-1)  # of the output embedding


@dataclass(frozen=True)
class IntegerPart:
    """Recipe for a tensor of integers that is computed from weights.

    Attributes:
        kind: a name in ``MAKERS``.
        sources: the weights.
        how: further arguments of the maker.
        packed: the quantized weight that ``sources`` are joined to, where the part is one of it.
    """

    kind: str
    sources: tuple[WeightSource, ...]
    how: tuple = ()
    packed: Optional[Packed] = field(default=None, compare=False)

    @property
    def key(self) -> tuple:
        """Tells this recipe from the others of one graph."""
        return f"integer_{self.kind}", self.sources, self.how

    def resolve(self, args: Sequence[Any]) -> Tensor:
        """The integers for the arguments of a call.

        Raises:
            WeightError: a value has no place in the integers of version 1.
        """
        tensors = [source.tensor(args) for source in self.sources]

        def make() -> Tensor:
            if self.packed is not None:
                return MAKERS[self.kind](self, self.packed.resolve(args), *self.how)
            return MAKERS[self.kind](self, *(t.detach() for t in tensors), *self.how)

        with torch.no_grad():
            return remember(self.key[0], tensors, (self.how, tuple(source.rows for source in self.sources)), make)


def _refuse_above(part: IntegerPart, value: Tensor, limit: float, what: str) -> None:
    largest = float(value.detach().abs().amax()) if value.numel() else 0.0
    if not largest < limit:
        name = part.sources[0].name
        raise WeightError(
            f"{name}: {what} of {largest:g}, and integer-only models take less than {limit:g}: rescale it."
        )


def _rows(part: IntegerPart, weight: IntScaleTensor, *_: bool) -> Tensor:
    scale = weight.row_scale.reshape(-1)[: weight.out_features]
    _refuse_above(part, scale, LARGEST_ROW_SCALE, "a row scale")
    return dyadic_of(scale)


def _gamma(part: IntegerPart, weight: Tensor) -> Tensor:
    _refuse_above(part, weight, LARGEST_GAMMA, "a factor of a norm")
    return dyadic_of(weight, 14, common=True)


def _beta(part: IntegerPart, weight: Tensor, bias: Tensor) -> Tensor:
    k = 15 + exponent(_gamma(part, weight)[:1].cpu())
    return torch.ldexp(bias.to("cpu", torch.float64), k).round().to(torch.int64).to(bias.device)


def _bias(part: IntegerPart, *tensors: Any) -> Tensor:
    """Q16 of one bias, or of several at their first rows (``how``: first rows, number of rows)."""
    *biases, first_rows, rows = tensors
    joined = torch.zeros(rows, dtype=torch.float64, device=biases[0].device)
    for first, bias in zip(first_rows, biases):
        joined[first : first + bias.shape[0]] = bias.to(torch.float64)
    _refuse_above(part, joined, 2.0**15, "a bias")
    return (joined * 2.0**FRACTION).round().to(torch.int32)


def _embedding_scales(weight: Tensor) -> Tensor:
    """float64 ``[V]``, on the CPU: a GPU multiplies by 1 / 127, after which halves (of bf16 weights) round to the other side."""
    scale = weight.detach().to("cpu", torch.float64).abs().amax(1) / 127
    return torch.where(scale > 0, scale, 1.0)


def _embedding_codes(part: IntegerPart, weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise WeightError(f"{part.sources[0].name} has NaN or Inf entries: repair the checkpoint.")
    codes = weight.detach().to("cpu", torch.float64) / _embedding_scales(weight).unsqueeze(1)
    return codes.round().to(torch.int8).to(weight.device)


MAKERS: dict[str, Callable[..., Tensor]] = {
    "rows": _rows,
    "gamma": _gamma,
    "beta": _beta,
    "bias": _bias,
    "embedding_codes": _embedding_codes,
    "embedding_scale": lambda part, weight: dyadic_of(_embedding_scales(weight)).to(weight.device),
    "rope_table": lambda part, inv_freq, length, scaling: rope_table(inv_freq, length, scaling),
}


def part_input(
    rewrite: GraphRewrite, kind: str, sources: Sequence[WeightSource], how: tuple = (), packed: Optional[Packed] = None
) -> fx.Node:
    """The graph input for a part."""
    recipe = IntegerPart(kind, tuple(sources), how, packed)
    return rewrite.add_packed_input(recipe, None, recipe.resolve(rewrite.example_inputs))


def source_of(rewrite: GraphRewrite, node: Any) -> Optional[WeightSource]:
    """The constant that the caller passes at ``node``: a parameter or a buffer; None for anything else."""
    return WeightFinder(rewrite).source(node)


def bias_input(rewrite: GraphRewrite, bias: fx.Node) -> Optional[fx.Node]:
    """The graph input for a bias as Q16; None where the graph computes the bias."""
    recipe, _ = rewrite.packed_inputs.get(bias, (None, None))
    if isinstance(recipe, ConcatenatedBias):
        return part_input(rewrite, "bias", recipe.sources, (recipe.first_rows, recipe.rows))
    source = source_of(rewrite, bias)
    if source is None:
        return None
    rows = source.tensor(rewrite.example_inputs).shape[0]
    return part_input(rewrite, "bias", (source,), ((0,), rows))
