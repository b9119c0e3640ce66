"""The critic's loss against its formula, and what it says of its foresight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.advantages import critic_targets, task_advantages
from opd_megatron.objectives.returns import generalized_advantages
from opd_megatron.objectives.statistics import finalize_statistics, merge_statistics
from opd_megatron.objectives.values import clipped_value_loss, value_objective, value_statistics


def draw(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_half_the_squared_error() -> None:
    values_N, returns_N = draw(20, 1).requires_grad_(), draw(20, 2)
    loss_N, clipped_N = clipped_value_loss(values_N, draw(20, 3), returns_N, 0.0)
    torch.testing.assert_close(loss_N, (values_N - returns_N) ** 2 / 2)
    (gradient_N,) = torch.autograd.grad(loss_N.sum(), values_N)
    torch.testing.assert_close(gradient_N, values_N.detach() - returns_N)
    assert not clipped_N.any()


@pytest.mark.parametrize("value_clip", [0.1, 0.5, 1.5])
def test_clipping_against_the_formula_and_autograd(value_clip: float) -> None:
    values_N, old_N, returns_N = draw(200, 1).requires_grad_(), draw(200, 2), draw(200, 3)
    loss_N, clipped_N = clipped_value_loss(values_N, old_N, returns_N, value_clip)
    plain_N = (values_N - returns_N) ** 2
    bound_N = (old_N + torch.clamp(values_N - old_N, -value_clip, value_clip) - returns_N) ** 2
    expected_N = 0.5 * torch.maximum(plain_N, bound_N)
    torch.testing.assert_close(loss_N, expected_N)
    (found_N,) = torch.autograd.grad(loss_N.sum(), values_N)
    (gradient_N,) = torch.autograd.grad(expected_N.sum(), values_N)
    torch.testing.assert_close(found_N, gradient_N)
    assert torch.equal(clipped_N, (gradient_N == 0))
    assert 0 < clipped_N.double().mean() < 1


def test_an_unmoved_value_has_its_whole_gradient() -> None:
    """As in the first optimizer step of a rollout."""
    values_N = draw(50, 1).requires_grad_()
    loss_N, clipped_N = clipped_value_loss(values_N, values_N.detach().clone(), draw(50, 2), 0.2)
    (gradient_N,) = torch.autograd.grad(loss_N.sum(), values_N)
    torch.testing.assert_close(gradient_N, values_N.detach() - draw(50, 2))
    assert not clipped_N.any()


def test_masked_positions_may_hold_anything() -> None:
    values_N, mask_N = draw(6, 1), torch.tensor([1, 1, 0, 1, 0, 1])
    weights_N = torch.full((6,), 0.25, dtype=torch.float64)
    dirty = [torch.where(mask_N.bool(), draw(6, seed), torch.nan) for seed in (1, 2, 3)]
    dirty[0].requires_grad_()
    loss, statistics = value_objective(*dirty, weights_N, mask_N, 0.2)
    keep = mask_N.bool()
    expected, clipped_N = clipped_value_loss(values_N[keep], draw(6, 2)[keep], draw(6, 3)[keep], 0.2)
    torch.testing.assert_close(loss, 0.25 * expected.sum())
    (gradient_N,) = torch.autograd.grad(loss, dirty[0])
    assert gradient_N.isfinite().all()
    means = finalize_statistics(merge_statistics([statistics]))
    assert means["train/value_loss"] == pytest.approx(expected.mean().item())
    assert means["train/value_clipfrac"] == pytest.approx(clipped_N.double().mean().item())


def test_explained_variance() -> None:
    returns, masks = [np.array([1.0, 2.0, 7.0]), np.array([4.0])], [np.array([1, 1, 0]), np.array([1])]

    def explained(values: list[list[float]]) -> float:
        found = value_statistics([np.array(part) for part in values], returns, masks)
        assert found["train/return_mean"] == pytest.approx(7 / 3)
        return found["train/explained_variance"]

    assert explained([[1.0, 2.0, 0.0], [4.0]]) == pytest.approx(1.0)
    assert explained([[0.0, 1.0, 9.0], [3.0]]) == pytest.approx(1.0), "a constant offset is no want of foresight"
    assert explained([[5.0, 5.0, 0.0], [5.0]]) == pytest.approx(0.0)
    assert explained([[4.0, 2.0, 0.0], [1.0]]) == pytest.approx(1 - np.var([3, 0, -3]) / np.var([1, 2, 4]))
    equal = value_statistics([np.zeros(2)], [np.ones(2)], [np.ones(2)])
    assert math.isnan(equal["train/explained_variance"])


PPO = ObjectiveOptions(advantage_estimator="ppo", gamma=0.9, lambd=0.8, kl_coef=0.3)
MASKS = [np.array([True, False, True, True, False]), np.zeros(0, dtype=bool), np.array([True, True]), np.zeros(2, bool)]
REWARDS = [1.5, -1.0, 0.25, 3.0]
LENGTHS = [len(mask) for mask in MASKS]


def recorded(seed: int) -> list[np.ndarray]:
    """Numbers of each sample, NaN where they mean nothing."""
    random = np.random.default_rng(seed)
    return [np.where(mask, random.normal(size=len(mask)), np.nan) for mask in MASKS]


@pytest.mark.parametrize("normalized", [False, True])
def test_time_passes_at_unmasked_tokens_and_the_reward_comes_with_the_last(normalized: bool) -> None:
    values, kls = recorded(1), recorded(2)
    options = ObjectiveOptions(**{**vars(PPO), "normalize_advantages": normalized})
    found = task_advantages(options, REWARDS, [0, 1, 2, 3], MASKS, kls, values=values)
    targets = critic_targets(options, REWARDS, MASKS, values, kls)
    expected, unmasked = [], []
    for place, mask in enumerate(MASKS):
        rewards = -0.3 * kls[place][mask]
        if len(rewards):
            rewards[-1] += REWARDS[place]
        steps = torch.from_numpy(rewards), torch.from_numpy(values[place][mask])
        advantages, returns = generalized_advantages(*steps, 0.9, 0.8)
        np.testing.assert_allclose(targets[place][mask], returns, rtol=1e-6)
        assert not targets[place][~mask].any()
        expected.append(advantages)
        unmasked.append(found[place][mask])
    whole = torch.cat(expected)
    if normalized:
        whole = (whole - whole.mean()) / (whole.var() + 1e-8).sqrt()
    np.testing.assert_allclose(torch.cat(unmasked), whole, rtol=1e-5, atol=1e-6)
    assert all(not found[place][~mask].any() for place, mask in enumerate(MASKS))


def test_values_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="ppo needs the critic's values"):
        task_advantages(PPO, REWARDS, [0, 1, 2, 3], MASKS, recorded(1))
    short = [*recorded(1)[:-1], np.zeros(1)]
    with pytest.raises(ValueError, match="sample 3 has 2 response tokens but 1 numbers for the critic's value"):
        task_advantages(PPO, REWARDS, [0, 1, 2, 3], MASKS, recorded(1), values=short)
    broken = recorded(1)
    broken[0][0] = np.inf
    with pytest.raises(ValueError, match="the critic's value of sample 0 is not finite"):
        critic_targets(PPO, REWARDS, MASKS, broken, recorded(1))
