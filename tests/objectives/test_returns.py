"""Generalised advantages against the sum they are defined by; returns are tested with their estimator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_megatron.objectives.returns import discounted_returns, generalized_advantages


def draw(length: int, seed: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("length", [0, 1, 2, 9])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.6, 0.0])
def test_advantages_are_discounted_sums_of_one_step_errors(length: int, gamma: float, gae_lambda: float) -> None:
    rewards_U, values_U = draw(length, 1), draw(length, 2).requires_grad_()
    advantages_U, returns_U = generalized_advantages(rewards_U, values_U, gamma, gae_lambda)
    values = [*values_U.tolist(), 0.0]
    errors = [rewards_U[u].item() + gamma * values[u + 1] - values[u] for u in range(length)]
    expected = [sum((gamma * gae_lambda) ** (k - u) * errors[k] for k in range(u, length)) for u in range(length)]
    torch.testing.assert_close(advantages_U, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns_U, advantages_U + values_U.detach())
    assert not advantages_U.requires_grad
    assert not returns_U.requires_grad


def test_the_ends_of_lambda_are_the_return_and_the_one_step_target() -> None:
    rewards_U, values_U = draw(7, 3), draw(7, 4)
    advantages_U, returns_U = generalized_advantages(rewards_U, values_U, 0.9, 1.0)
    torch.testing.assert_close(returns_U, discounted_returns(rewards_U, 0.9))
    torch.testing.assert_close(advantages_U, discounted_returns(rewards_U, 0.9) - values_U)
    _, targets_U = generalized_advantages(rewards_U, values_U, 0.9, 0.0)
    following_U = torch.cat([values_U[1:], torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(targets_U, rewards_U + 0.9 * following_U)


def test_the_true_values_leave_nothing_to_learn() -> None:
    rewards_U = draw(6, 5)
    advantages_U, _ = generalized_advantages(rewards_U, discounted_returns(rewards_U, 0.8), 0.8, 0.5)
    torch.testing.assert_close(advantages_U, torch.zeros(6, dtype=torch.float64))
