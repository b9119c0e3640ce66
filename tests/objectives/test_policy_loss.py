from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_megatron.objectives.log_probs import importance_ratio
from opd_megatron.objectives.policy_loss import clipped_policy_loss


def loss_and_gradient(
    ratio: float, advantage: float, low: float, high: float | None = None, dual: float | None = None
) -> tuple[float, float, bool]:
    """Loss, its derivative by log p at ``p / p_old = ratio``, and whether the token is clipped."""
    old_N = torch.tensor([-1.3], dtype=torch.float64)
    log_probs_N = (old_N + math.log(ratio)).requires_grad_()
    ratio_N = importance_ratio(log_probs_N, old_N)
    loss_N, clipped_N = clipped_policy_loss(ratio_N, torch.tensor([advantage]).double(), low, high, dual)
    (gradient_N,) = torch.autograd.grad(loss_N.sum(), log_probs_N)
    return loss_N.item(), gradient_N.item(), bool(clipped_N.item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped", "loss"),
    [
        (1.0, 2.0, False, -2.0),
        (1.0, -2.0, False, 2.0),
        (1.1, 2.0, False, -2.2),
        (1.3, 2.0, True, -2.4),  # has risen enough
        (0.5, 2.0, False, -1.0),  # must come back up
        (0.7, -2.0, True, 1.6),  # has fallen enough
        (1.5, -2.0, False, 3.0),  # must come back down
        (1.3, 0.0, False, 0.0),
    ],
)
def test_ppo_clip(ratio: float, advantage: float, clipped: bool, loss: float) -> None:
    got, gradient, was_clipped = loss_and_gradient(ratio, advantage, 0.2)
    assert got == pytest.approx(loss)
    assert was_clipped is clipped
    assert gradient == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_clip_higher_widens_the_upper_side_only() -> None:
    assert loss_and_gradient(1.25, 1.0, 0.2)[2]
    assert not loss_and_gradient(1.25, 1.0, 0.2, 0.28)[2]
    assert loss_and_gradient(1.3, 1.0, 0.2, 0.28)[0] == pytest.approx(-1.28)
    assert loss_and_gradient(0.75, -1.0, 0.2, 0.28)[0] == pytest.approx(0.8)
    assert loss_and_gradient(0.75, -1.0, 0.2, 0.28)[2]


def test_dual_clip_bounds_the_loss_of_negative_advantages() -> None:
    cases = {
        (5.0, -2.0): (6.0, 0.0, True),
        (2.5, -2.0): (5.0, 5.0, False),
        (0.5, -2.0): (1.6, 0.0, True),
        (5.0, 2.0): (-2.4, 0.0, True),
    }
    for (ratio, advantage), expected in cases.items():
        assert loss_and_gradient(ratio, advantage, 0.2, dual=3.0) == pytest.approx(expected)


def test_on_policy_gradient_is_the_policy_gradient_whatever_the_clip_range() -> None:
    log_probs_N = torch.tensor([-0.5, -2.0, -9.0], requires_grad=True)
    advantages_N = torch.tensor([1.5, -0.5, 3.0])
    for eps_clip in (0.2, 0.0):
        ratio_N = importance_ratio(log_probs_N, log_probs_N.detach())
        loss_N, clipped_N = clipped_policy_loss(ratio_N, advantages_N, eps_clip)
        (gradient_N,) = torch.autograd.grad(loss_N.sum(), log_probs_N)
        torch.testing.assert_close(gradient_N, -advantages_N)
        assert not clipped_N.any()


def test_against_the_formula_on_random_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    old_N = -3 * torch.rand(500, generator=generator, dtype=torch.float64)
    log_probs_N = old_N + torch.randn(500, generator=generator, dtype=torch.float64)
    advantages_N = torch.randn(500, generator=generator, dtype=torch.float64)
    got_N, clipped_N = clipped_policy_loss(importance_ratio(log_probs_N, old_N), advantages_N, 0.2, 0.3, 2.0)
    for log_prob, old, advantage, got, clipped in zip(
        log_probs_N.tolist(), old_N.tolist(), advantages_N.tolist(), got_N.tolist(), clipped_N.tolist(), strict=True
    ):
        ratio = math.exp(log_prob - old)
        plain = ratio * advantage
        expected = min(plain, min(max(ratio, 0.8), 1.3) * advantage)
        if advantage < 0:
            expected = max(expected, 2.0 * advantage)
        assert got == pytest.approx(-expected)
        assert clipped is (abs(expected - plain) > 1e-12)
    assert 0.1 < clipped_N.double().mean() < 0.9


def test_gradcheck_away_from_the_corners() -> None:
    old_N = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    log_probs_N = old_N + torch.tensor([0.05, 1.0, -1.0, 2.0], dtype=torch.float64)
    advantages_N = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)

    def loss(current_N: Tensor) -> Tensor:
        return clipped_policy_loss(importance_ratio(current_N, old_N), advantages_N, 0.2, None, 3.0)[0]

    assert torch.autograd.gradcheck(loss, log_probs_N.requires_grad_())


def test_extreme_ratios_stay_finite_and_no_gradient_reaches_the_other_inputs() -> None:
    log_probs_N = torch.tensor([0.0, -500.0], requires_grad=True)
    old_N = torch.tensor([-500.0, 0.0], requires_grad=True)
    advantages_N = torch.tensor([-1.0, 1.0], requires_grad=True)
    loss_N, _ = clipped_policy_loss(importance_ratio(log_probs_N, old_N), advantages_N, 0.2)
    loss_N.sum().backward()
    assert loss_N.isfinite().all()
    assert log_probs_N.grad is not None
    assert log_probs_N.grad.isfinite().all()
    assert old_N.grad is None
    assert advantages_N.grad is None
