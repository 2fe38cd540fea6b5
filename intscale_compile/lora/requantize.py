"""A changed weight put back into the format that it had: group size, bits, zero points, rotation, static activation scale.

Rows keep the scales that they have where these still round the row best, so that a row that did not change keeps its codes too.

A small change is lost to rounding: most of its entries are below half a step. What a low-rank change ``B A`` does to a layer's
output goes through the few directions of the input that ``A`` reads, so codes are chosen to keep the weight's effect along
these directions: coordinate descent on

    ||E||^2 + strength ||E Q||^2,     E = W - W',  Q an orthonormal basis of the rows of A

which needs no data and no matrix of the size of a Hessian.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import format as fmt
from ..calibration.clipping import choose_steps
from ..calibration.solve import Codes
from ..config import IntScaleConfig
from ..errors import OverflowProofError, WeightError
from ..kernels.hadamard import hadamard_transform
from ..tensors.intscale_tensor import IntScaleTensor

# tiny-llama tuned on other text, perplexity unmerged 128.8: 0 (nearest) 494.8, 1 197.4, 4 145.3, 16 140.6, 64 147.1.
STRENGTH = 16.0
SWEEPS = 2


class Grid(NamedTuple):
    """Where the codes of a weight are rounded to: ``W = steps * codes - shift``, each ``[N, G]`` in fp32."""

    steps: Tensor
    shift: Optional[Tensor]
    low: int
    high: int


def requantized(
    tensor: IntScaleTensor, dense: Tensor, name: str, directions: Optional[Tensor] = None
) -> IntScaleTensor:
    """The weight ``dense`` in the format of ``tensor``.

    Args:
        tensor: quantized, ``[N, K]`` or a stack of experts, transposed or not; where its fp32 form equals ``dense``, the
            result is this very tensor.
        dense: floating point, in the shape of ``tensor``.
        name: named in errors.
        directions: directions of the input that the change reads, ``[r, K]``; None: codes are rounded to the nearest.

    Raises:
        WeightError: ``dense`` is not finite, or has another shape.
        OverflowProofError: the accumulator of a row cannot be proved free of overflow.
    """
    if dense.shape != tensor.shape:
        raise WeightError(f"{name}: the changed weight has shape {tuple(dense.shape)}, not {tuple(tensor.shape)}.")
    dense = dense.detach().float()
    if torch.equal(dense, tensor.dequantize(torch.float32)):
        return tensor
    if not bool(torch.isfinite(dense).all()):
        raise WeightError(f"{name}: the changed weight has NaN or Inf entries: the adapter is damaged.")
    if tensor.transposed:
        return requantized(tensor.transpose(-2, -1), dense.mT, name, directions).transpose(-2, -1)  # type: ignore[arg-type, return-value]
    if tensor.dim() == 3:
        parts = [
            requantized(one, d, f"{name}[{e}]", directions) for e, (one, d) in enumerate(zip(tensor.unbind(0), dense))
        ]  # type: ignore[arg-type]
        return torch.stack(parts)  # type: ignore[arg-type, return-value]
    plain = tensor.to_packing("plain")
    wanted = stored_form(plain, dense)
    basis = None if directions is None else orthonormal(stored_form(plain, directions.float()))
    changed = _best_rows(plain, wanted, basis, name)
    unsafe = changed.accumulator_bound() > fmt.INT32_MAX
    if bool(unsafe.any()):
        raise OverflowProofError(
            f"{name}: row {int(unsafe.nonzero()[0])} could overflow its int32 accumulator with the merged weight: quantize the "
            "layer anew, with fewer scale_bits."
        )
    return changed.to_packing(tensor.packing_format)


def stored_form(tensor: IntScaleTensor, rows: Tensor) -> Tensor:
    """fp32 rows ``[..., K]`` over the input features, over the stored columns of a weight: ordered or rotated as it is."""
    if tensor.input_order is not None:
        rows = rows.index_select(-1, tensor.input_order.view(-1))
    return hadamard_transform(rows, tensor.rotation) if tensor.rotation else rows


def orthonormal(rows: Tensor) -> Optional[Tensor]:
    """An orthonormal basis ``[K, r]`` of the space that rows ``[r, K]`` span; None where it is empty."""
    left, sizes, _ = torch.linalg.svd(rows.double().mT, full_matrices=False)
    kept = sizes > 1e-6 * sizes.max().clamp(min=1e-300)
    return left[:, kept].float() if bool(kept.any()) else None


def own_grid(tensor: IntScaleTensor) -> Grid:
    """The grid that a plain 2-D weight stands on."""
    scale, zero_point = tensor.group_scale.float(), tensor.group_zero_point
    steps = scale * tensor.row_scale
    if zero_point is None:
        shift = None
    else:
        shift = zero_point.float() * (tensor.row_scale if fmt.is_offset(zero_point) else steps)
    low, high = (-127, 127) if tensor.weight_bits == 8 else (fmt.CODE_MIN, fmt.CODE_MAX)
    return Grid(steps, shift, low, high)


def rounded(weight: Tensor, grid: Grid, basis: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[N, Kp]`` of a padded weight ``[N, Kp]`` on a grid, and the error of each row ``[N]``."""
    width = weight.shape[-1]
    steps = grid.steps.repeat_interleave(width // grid.steps.shape[-1], dim=-1)
    target = (
        weight if grid.shift is None else weight + grid.shift.repeat_interleave(width // grid.shift.shape[-1], dim=-1)
    )
    codes = (target / steps).round_().clamp_(grid.low, grid.high)
    error = target - codes * steps
    if basis is None:
        return codes.to(torch.int8), error.square().sum(-1)
    for _ in range(SWEEPS):
        _descend(target, steps, codes, error, basis, grid)
    cost = error.square().sum(-1) + STRENGTH * (error @ basis).square().sum(-1)
    return codes.to(torch.int8), cost


def _descend(target: Tensor, steps: Tensor, codes: Tensor, error: Tensor, basis: Tensor, grid: Grid) -> None:
    """One sweep of coordinate descent over all columns; in place."""
    along = error @ basis  # [N, r]
    lengths = 1 + STRENGTH * basis.square().sum(-1)
    for j in range(basis.shape[0]):
        pull = (error[:, j] + STRENGTH * (along @ basis[j])) / lengths[j]
        new = ((codes[:, j] * steps[:, j] + pull) / steps[:, j]).round_().clamp_(grid.low, grid.high)
        change = (codes[:, j] - new) * steps[:, j]
        codes[:, j] = new
        error[:, j] += change
        along.addr_(change, basis[j])


def _best_rows(tensor: IntScaleTensor, wanted: Tensor, basis: Optional[Tensor], name: str) -> IntScaleTensor:
    """Each row on its own grid or on a new one, whichever rounds it with less error."""
    extra = fmt.padded_in_features(tensor.in_features, tensor.group_size) - tensor.in_features
    wide = F.pad(wanted, (0, extra))
    if basis is not None:
        basis = F.pad(basis, (0, 0, 0, extra))
    codes, cost = rounded(wide, own_grid(tensor), basis)
    codes[:, tensor.in_features :] = 0
    kept = tensor.replaced(qdata=_packed(codes, tensor))
    if tensor.zero_point is not None or tensor.scale.dtype != torch.uint8:
        return kept
    config = IntScaleConfig(tensor.group_size, tensor.weight_bits, tensor.scale_bits, packing_format="plain")
    steps = choose_steps(wide, config, None, integer=True)
    new_codes, new_cost = rounded(wide, Grid(steps, None, *own_grid(tensor)[2:]), basis)
    new_codes = new_codes[:, : tensor.in_features]
    new = Codes(new_codes, steps[:, : _groups(tensor)], config, tensor.dtype).tensor(name)
    better = (new_cost < cost).unsqueeze(-1)
    names = ("qdata", "scale", "per_tensor_scale")
    return kept.replaced(**{n: torch.where(better, getattr(new, n), getattr(kept, n)) for n in names})


def _groups(tensor: IntScaleTensor) -> int:
    """Groups without those of the padding."""
    return 1 if tensor.group_size == -1 else -(-tensor.in_features // tensor.group_size)


def _packed(codes: Tensor, tensor: IntScaleTensor) -> Tensor:
    return codes if tensor.weight_bits == 8 else fmt.pack_int4(codes, tensor.group_size)
