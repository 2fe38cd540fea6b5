"""GPTQ on a given grid."""

from __future__ import annotations

import pytest
import torch

from intscale_compile.calibration.gptq import (
    BLOCK,
    compensated,
    damped,
    feedback,
    gptq_codes,
    output_error,
    round_block,
)
from intscale_compile.errors import CalibrationError

N, K, GROUPS = 24, 320, 5  # more than two blocks of 128 columns, the last one short


def correlated(columns: int = K, tokens: int = 2000) -> torch.Tensor:
    """Hessian of activations with sources in common and channels of different size."""
    x = torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + torch.randn(tokens, columns)
    x = x * torch.randn(columns).exp()
    return x.mT @ x


def grid(weight: torch.Tensor) -> torch.Tensor:
    return weight.unflatten(-1, (GROUPS, -1)).abs().amax(-1) / 7.5


def rounded(codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return codes * steps.repeat_interleave(codes.shape[-1] // steps.shape[-1], dim=-1)


def nearest(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return (weight.unflatten(-1, (GROUPS, -1)) / steps.unsqueeze(-1)).round().clamp(-8, 7).flatten(-2).to(torch.int8)


def error_of(codes, weight, steps, hessian) -> float:
    return float(output_error(weight, rounded(codes, steps), hessian).sum())


@pytest.fixture
def case():
    weight = torch.randn(N, K)
    return weight, grid(weight), correlated()


@pytest.mark.parametrize("act_order", [True, False])
def test_beats_rounding_to_nearest(case, act_order):
    weight, steps, hessian = case
    codes = gptq_codes(weight, steps, hessian, act_order=act_order)
    assert codes.dtype == torch.int8 and int(codes.min()) >= -8 and int(codes.max()) <= 7
    assert error_of(codes, *case) < 0.5 * error_of(nearest(weight, steps), *case)


def test_is_the_published_algorithm(case):
    """Column by column with the inverse of H and its upper Cholesky factor, as in arXiv 2210.17323, in fp64."""
    weight, steps, hessian = case
    codes = gptq_codes(weight.double(), steps.double(), hessian.double(), act_order=False)
    inverse = torch.linalg.inv(damped(hessian.double(), 0.01))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, wide = weight.double().clone(), steps.double().repeat_interleave(K // GROUPS, dim=-1)
    for j in range(K):
        code = (rest[:, j] / wide[:, j]).round().clamp(-8, 7)
        assert torch.equal(code.to(torch.int8), codes[:, j]), f"column {j}"
        error = (rest[:, j] - code * wide[:, j]) / upper[j, j]
        rest[:, j:] -= error[:, None] * upper[j, None, j:]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_diagonal_hessian_gives_rounding_to_nearest(act_order, sweeps):
    weight = torch.randn(N, K)
    steps = grid(weight)
    hessian = torch.diag(torch.rand(K) + 0.1)
    codes = gptq_codes(weight, steps, hessian, act_order=act_order, sweeps=sweeps)
    assert torch.equal(codes, nearest(weight, steps))


def test_activation_order_helps_where_channels_differ(case):
    ordered, plain = (error_of(gptq_codes(*case, act_order=order), *case) for order in (True, False))
    assert ordered < 0.95 * plain


def test_sweeps_never_raise_the_error(case):
    weight, steps, hessian = case
    matrix = damped(hessian, 0.01)
    errors = [error_of(gptq_codes(*case, sweeps=sweeps), weight, steps, matrix) for sweeps in range(4)]
    assert errors[0] > errors[1] >= errors[2] >= errors[3] and errors[1] < 0.999 * errors[0]


def test_stack_equals_its_matrices():
    weight = torch.randn(3, N, K)
    steps = torch.stack([grid(w) for w in weight])
    hessian = torch.stack([correlated() for _ in weight])
    codes = gptq_codes(weight, steps, hessian)
    for e in range(3):
        single = gptq_codes(weight[e], steps[e], hessian[e])
        assert (codes[e] == single).float().mean() > 0.999  # batched products may sum in another order


def test_same_bits_again(case):
    assert torch.equal(gptq_codes(*case, sweeps=1), gptq_codes(*case, sweeps=1))


def test_damping_reaches_towards_rounding_to_nearest(case):
    weight, steps, _ = case
    changed = [(gptq_codes(*case, damping=d) != nearest(weight, steps)).float().mean() for d in (0.01, 1.0)]
    assert changed[1] < changed[0]


def test_dead_columns_and_too_little_data():
    """Fewer tokens than channels and channels that were never active: rank-deficient, repaired by damping."""
    weight = torch.randn(N, K)
    x = torch.randn(40, K)
    x[:, 7] = 0
    codes = gptq_codes(weight, grid(weight), x.mT @ x)
    assert torch.equal(codes[:, 7], nearest(weight, grid(weight))[:, 7])
    empty = gptq_codes(weight, grid(weight), torch.zeros(K, K))
    assert torch.equal(empty, nearest(weight, grid(weight)))


def test_damping_grows_until_the_factorization_succeeds():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.2  # not positive definite unless at least 0.2 is added
    rows = feedback(hessian, 0.01)
    assert torch.isfinite(rows).all() and torch.equal(rows.diagonal(), torch.ones(8))
    assert not rows.tril(-1).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_a_hessian_that_is_not_finite(value):
    hessian = torch.eye(8)
    hessian[3, 3] = value
    with pytest.raises(CalibrationError, match="not finite"):
        feedback(hessian, 0.01)


def test_refuses_a_hessian_without_factorization():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 50.0
    with pytest.raises(CalibrationError, match="Cholesky"):
        feedback(hessian, 0.01)


def test_round_block_by_hand():
    """Two columns: the first leaves an error of 0.3, half of which moves the second from 0.4 to 0.55."""
    target = torch.tensor([[[1.3, 0.4]]])
    rows = torch.tensor([[[1.0, 0.5], [9.0, 1.0]]])
    codes, errors = round_block(target, target, torch.ones(1, 1, 2), rows, (-8, 7))
    assert codes.tolist() == [[[1, 1]]]
    torch.testing.assert_close(errors, torch.tensor([[[0.3, -0.6]]]))
    assert BLOCK >= 2


def test_compensation_is_least_squares():
    """With inputs that lost something, the compensated weight comes as close to the original output as regression does."""
    weight, before = torch.randn(N, 32).double(), torch.randn(500, 32).double()
    now = before + 0.3 * torch.randn(500, 32).double() + 0.2 * before.roll(1, -1)
    found = compensated(weight, now.mT @ now, (before - now).mT @ now, 1e-9)
    wanted = torch.linalg.lstsq(now, before @ weight.mT).solution.mT
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
