"""GPTQ (arXiv 2210.17323) on a fixed grid: codes rounded column by column, the error of each passed on to later columns.

With ``H = X^T X`` over the calibration tokens, the squared error of a layer's output is ``tr(E H E^T)``, ``E = W - W'``.
Factor ``H = M M^T`` with ``M`` upper triangular; then the error is ``||E M||^2``, and its column ``j`` reads
``E_j M_jj + sum_{i<j} E_i M_ij``. So the best code of column ``j``, all columns before it being settled, is that of

    T_j = W_j + sum_{i<j} E_i F_ij,     F_ij = M_ij / M_jj

which is GPTQ's update without the inverse of ``H``: one Cholesky factorization of ``H``, its rows and columns reversed.

The scales are chosen before ("static groups"), so columns may be visited in any order; the order of falling ``H_jj``
("activation order") settles the columns that matter most while all others can still make up for them.

Sweeps of coordinate descent may follow (QuantEase, arXiv 2309.01885): each column is rounded again with all others fixed,
to the code of ``W'_j + (E H)_j / H_jj``. The error never grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..kernels.cpu_gptq_block import round_block_cpu

BLOCK = 128  # columns that are rounded one by one before their errors reach the rest in one product
MAX_DAMPING = 1.0


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``H`` with ``damping`` times its mean diagonal added; a dead column (no activation ever) gets 1 on its diagonal.

    Args:
        hessian: fp32 or fp64 ``[..., K, K]``, symmetric.
        damping: fraction of the mean diagonal entry.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    added = torch.where(diagonal > 0, damping * mean, mean)
    result = hessian.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(added)
    return result


def feedback(hessian: Tensor, damping: float) -> Tensor:
    """``F`` of the module's docstring, fp32 ``[..., K, K]``, unit upper triangular.

    Where the factorization fails the damping is made ten times as large, up to 1.

    Raises:
        CalibrationError: ``hessian`` has no factorization even so, or is not finite.
    """
    if not bool(torch.isfinite(hessian.diagonal(dim1=-2, dim2=-1)).all()):
        raise CalibrationError("the statistics of an activation are not finite: look for NaN or Inf in the data.")
    while True:
        lower, info = torch.linalg.cholesky_ex(damped(hessian, damping).flip(-2, -1))
        if not bool(info.any()):
            break
        del lower
        damping = max(10 * damping, 1e-3)
        if damping > MAX_DAMPING:
            raise CalibrationError("a Hessian has no Cholesky factorization: use more calibration data.")
    upper = lower.flip(-2, -1)
    return upper / upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)


def gptq_codes(
    weight: Tensor,
    steps: Tensor,
    hessian: Tensor,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    sweeps: int = 0,
    code_range: tuple[int, int] = (-8, 7),
) -> Tensor:
    """Codes of a weight for given steps.

    Args:
        weight: fp32 ``[..., N, K]``.
        steps: fp32 ``[..., N, G]``, the step (row scale times group scale) of each group of ``K / G`` columns.
        hessian: fp32 ``[..., K, K]``, sums of ``x x^T``.
        act_order: visit columns in the order of falling ``H_jj`` instead of theirs.
        damping: fraction of the mean of ``H_jj`` that is added to the diagonal.
        sweeps: sweeps of coordinate descent afterwards.
        code_range: smallest and largest code.

    Returns:
        int8 ``[..., N, K]``.

    Raises:
        CalibrationError: the Hessian cannot be factored.
    """
    lead = weight.shape[:-2]
    columns = weight.shape[-1]
    weight, steps = weight.reshape(-1, *weight.shape[-2:]), steps.reshape(-1, *steps.shape[-2:])
    hessian = hessian.reshape(-1, columns, columns)
    wide_steps = steps.repeat_interleave(columns // steps.shape[-1], dim=-1)
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True) if act_order else None
    if order is not None:
        weight, wide_steps = _take_columns(weight, order), _take_columns(wide_steps, order)
        hessian = _take_columns(_take_columns(hessian, order).mT, order)
    codes = _settle_columns(weight, wide_steps, feedback(hessian, damping), code_range)
    matrix = damped(hessian, damping) if sweeps else hessian
    for _ in range(sweeps):
        codes = _descend(weight, wide_steps, matrix, codes, code_range)
    if order is not None:
        codes = _take_columns(codes, order.argsort(dim=-1))
    return codes.reshape(*lead, *codes.shape[-2:])


def _take_columns(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix.gather(-1, order.unsqueeze(-2).expand(*matrix.shape[:-1], order.shape[-1]))


def _settle_columns(weight: Tensor, steps: Tensor, rows: Tensor, code_range: tuple[int, int]) -> Tensor:
    """GPTQ proper: ``weight`` and ``steps`` ``[B, N, K]``, ``rows`` (``F``) ``[B, K, K]``."""
    errors = torch.empty_like(weight)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        reference = weight[..., block]
        target = torch.baddbmm(reference, errors[..., :start], rows[:, :start, block]) if start else reference
        codes[..., block], errors[..., block] = round_block(
            target, reference, steps[..., block], rows[:, block, block], code_range
        )
    return codes


def _descend(weight: Tensor, steps: Tensor, hessian: Tensor, codes: Tensor, code_range: tuple[int, int]) -> Tensor:
    """One sweep of coordinate descent over all columns."""
    rounded = codes * steps
    pull = (weight - rounded) @ hessian  # minus half the gradient
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    codes = codes.clone()
    for start in range(0, weight.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        reference = rounded[..., block]
        scaled = hessian[:, block, block] / diagonal[..., block]
        target = reference + pull[..., block] / diagonal[..., block]
        codes[..., block], change = round_block(target, reference, steps[..., block], scaled, code_range)
        pull = torch.baddbmm(pull, change, hessian[:, block])
    return codes


def round_block(
    target: Tensor, reference: Tensor, steps: Tensor, rows: Tensor, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Round up to 128 columns one after the other.

    Column ``j`` of ``target`` is rounded after ``sum_{i<j} error_i rows_ij`` was added to it, where
    ``error_i = reference_i - rounded_i``.

    Args:
        target, reference, steps: fp32 ``[B, N, C]``.
        rows: fp32 ``[B, C, C]``; only what lies above its diagonal is used.
        code_range: smallest and largest code.

    Returns:
        Codes int8 and errors fp32, ``[B, N, C]``.
    """
    if target.is_cuda:
        # Imports Triton, which only GPUs need.
        from ..kernels.gptq_block import round_block_gpu

        return round_block_gpu(target, reference, steps, rows, code_range)
    if target.is_cpu and (found := round_block_cpu(target, reference, steps, rows, code_range)) is not None:
        return found
    return _round_by_operators(target, reference, steps, rows, code_range)


def _round_by_operators(
    target: Tensor, reference: Tensor, steps: Tensor, rows: Tensor, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """``round_block`` as operators of PyTorch."""
    rest = target.mT.clone(memory_format=torch.contiguous_format)  # one column is one contiguous piece
    reference, steps = reference.mT.contiguous(), steps.mT.contiguous()
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    for j in range(rest.shape[1]):
        torch.div(rest[:, j], steps[:, j], out=codes[:, j])
        codes[:, j].round_().clamp_(*code_range)
        errors[:, j] = reference[:, j] - codes[:, j] * steps[:, j]
        if j + 1 < rest.shape[1]:
            rest[:, j + 1 :].baddbmm_(rows[:, j, j + 1 :, None], errors[:, j, None, :])
    return codes.mT.to(torch.int8), errors.mT


def compensated(weight: Tensor, hessian: Tensor, lost: Tensor, damping: float) -> Tensor:
    """The weight that makes up for what its inputs have lost: ``W + W D (H + damping)^-1``, ``D = sum (x0 - x) x^T``.

    It minimises ``||W x0 - W' x||^2``, the ``x0`` being the inputs in the original model (GPTAQ, arXiv 2504.02692, which
    carries the same term through its column loop).

    Args:
        weight: fp32 ``[N, K]``.
        hessian, lost: fp32 ``[K, K]``.
        damping: fraction of the mean diagonal entry, as in GPTQ.
    """
    lower, info = torch.linalg.cholesky_ex(damped(hessian, damping))
    if bool(info.any()):
        raise CalibrationError("a Hessian has no Cholesky factorization: use more calibration data.")
    return weight + torch.cholesky_solve((weight @ lost).mT, lower).mT


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """``tr(E H E^T)`` for each row: fp32 ``[..., N]`` of weights ``[..., N, K]``."""
    error = weight - rounded
    return (error @ hessian * error).sum(-1)
