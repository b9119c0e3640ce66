"""What must hold for any rollout: order, masks, shifts, scales and precision, for every estimator and policy loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.advantages import task_advantages
from opd_megatron.objectives.estimators import ADVANTAGE_ESTIMATORS
from opd_megatron.objectives.policy_loss import POLICY_LOSSES, PolicyTerms
from opd_megatron.objectives.sequences import Sequences

every_estimator = pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
every_loss = pytest.mark.parametrize("policy_loss", sorted(POLICY_LOSSES))
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=15, deadline=None, derandomize=True)


class Rollout:
    """Rewards, groups, masks and the greedy rewards of a random rollout; some responses are empty or masked."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.count = int(random.integers(1, 12))
        self.groups = random.integers(0, 4, self.count).tolist()
        self.rewards = random.integers(-4, 5, self.count).astype(float).tolist()
        self.masks = [random.random(int(random.integers(0, 6))) < 0.7 for _ in range(self.count)]
        of_group = random.integers(-4, 5, 4)
        self.greedy = [float(of_group[group]) for group in self.groups]
        self.order = random.permutation(self.count).tolist()

    def advantages(self, estimator: str, order: list[int] | None = None, **changes: object) -> list[Tensor]:
        rewards = changes.pop("rewards", self.rewards)
        greedy = changes.pop("greedy", self.greedy)
        masks = changes.pop("masks", self.masks)
        options = ObjectiveOptions(advantage_estimator=estimator, **changes)  # type: ignore[arg-type]
        lists = [rewards, self.groups, masks, greedy]
        if order is not None:
            lists = [[values[place] for place in order] for values in lists]  # type: ignore[index]
        rewards, groups, masks, greedy = lists
        chosen = ADVANTAGE_ESTIMATORS[estimator]
        # a critic that expects of each response what the greedy one got
        values = [np.where(mask, base, np.nan) for base, mask in zip(greedy, masks, strict=True)]  # type: ignore[call-overload]
        return task_advantages(
            options,
            rewards,  # type: ignore[arg-type]
            groups,
            masks,  # type: ignore[arg-type]
            None,
            greedy if chosen.needs_greedy else None,  # type: ignore[arg-type]
            values if chosen.needs_values else None,
        )


@every_estimator
@given(seed=seeds, whitened=st.booleans())
@few
def test_the_order_of_samples_changes_nothing(estimator: str, seed: int, whitened: bool) -> None:
    rollout = Rollout(seed)
    straight = rollout.advantages(estimator, normalize_advantages=whitened)
    shuffled = rollout.advantages(estimator, rollout.order, normalize_advantages=whitened)
    for place, sample in enumerate(rollout.order):
        torch.testing.assert_close(shuffled[place], straight[sample], rtol=1e-5, atol=1e-6)


@every_estimator
@given(seed=seeds)
@few
def test_masked_tokens_get_nothing_and_are_no_time(estimator: str, seed: int) -> None:
    """A masked token at the end of every response leaves all others as they were."""
    rollout = Rollout(seed)
    longer = rollout.advantages(estimator, masks=[np.append(mask, False) for mask in rollout.masks])
    for found_T, before_T, mask in zip(longer, rollout.advantages(estimator), rollout.masks, strict=True):
        assert found_T[-1] == 0
        assert (found_T[:-1][torch.from_numpy(~mask)] == 0).all()
        torch.testing.assert_close(found_T[:-1], before_T, rtol=1e-6, atol=1e-7)


@every_estimator
@given(seed=seeds, shift=st.integers(-8, 8))
@few
def test_a_constant_reward_teaches_nothing(estimator: str, seed: int, shift: int) -> None:
    """All estimators with a baseline, and whitening, which is one where all responses are of one length."""
    rollout = Rollout(seed)
    masks = [np.ones(2, dtype=bool)] * rollout.count
    rewards = [reward + shift for reward in rollout.rewards]
    greedy = [reward + shift for reward in rollout.greedy]
    shifted = rollout.advantages(estimator, masks=masks, rewards=rewards, greedy=greedy)
    for found_T, before_T in zip(shifted, rollout.advantages(estimator, masks=masks), strict=True):
        torch.testing.assert_close(found_T, before_T, rtol=1e-5, atol=1e-6)


@every_estimator
@given(seed=seeds, exponent=st.integers(-3, 3))
@few
def test_the_scale_of_rewards_is_kept_or_divided_out(estimator: str, seed: int, exponent: int) -> None:
    rollout, scale = Rollout(seed), 2.0**exponent
    plain = rollout.advantages(estimator)
    rewards = [scale * reward for reward in rollout.rewards]
    scaled = rollout.advantages(estimator, rewards=rewards, greedy=[scale * reward for reward in rollout.greedy])
    divided_out = estimator == "grpo" or ADVANTAGE_ESTIMATORS[estimator].always_whitened
    for found_T, before_T in zip(scaled, plain, strict=True):
        expected_T = before_T if divided_out else scale * before_T
        torch.testing.assert_close(found_T, expected_T, rtol=1e-4, atol=1e-5)


@every_estimator
@given(seed=seeds)
@few
def test_float32_rewards_and_masks_of_any_kind_are_the_same(estimator: str, seed: int) -> None:
    rollout = Rollout(seed)
    expected = rollout.advantages(estimator)
    rewards = np.array(rollout.rewards, dtype=np.float32).tolist()
    masks = [torch.from_numpy(mask).to(torch.int32) for mask in rollout.masks]
    for found_T, expected_T in zip(rollout.advantages(estimator, rewards=rewards, masks=masks), expected, strict=True):
        assert torch.equal(found_T, expected_T)


class Step:
    """Positions of a few responses with everything that a policy loss reads."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(0, 6, (5,), generator=generator)
        size = int(self.lengths.sum())

        def draw() -> Tensor:
            return torch.rand(size, generator=generator, dtype=torch.float64)

        self.mask_N = draw() < 0.7
        self.old_N = (-3 * draw()).to(dtype)
        self.log_probs_N = (self.old_N + draw() - 0.5).to(dtype)
        self.advantages_N = (4 * draw() - 2).to(dtype)
        self.of_N = torch.arange(5).repeat_interleave(self.lengths)

    def loss(self, policy_loss: str, places_N: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        """``[2, N]`` loss and gradient, at positions in another order, with responses numbered anew."""
        places_N = torch.arange(len(self.of_N)) if places_N is None else places_N
        numbers = torch.arange(5) if numbers is None else numbers
        log_probs_N, old_N, advantages_N = (
            torch.where(self.mask_N, values_N, 0.0)[places_N]
            for values_N in (self.log_probs_N, self.old_N, self.advantages_N)
        )
        log_probs_N.requires_grad_()
        sequences = Sequences(numbers[self.of_N][places_N], 5)
        options = ObjectiveOptions(policy_loss=policy_loss)
        terms = PolicyTerms(log_probs_N, old_N, advantages_N, self.mask_N[places_N], sequences, options)
        loss_N = torch.where(self.mask_N[places_N], POLICY_LOSSES[policy_loss](terms)[0], 0.0)
        (gradient_N,) = torch.autograd.grad(loss_N.sum(), log_probs_N)
        return torch.stack([loss_N.detach(), gradient_N])


@every_loss
@given(seed=seeds)
@few
def test_the_order_of_tokens_and_responses_changes_no_loss(policy_loss: str, seed: int) -> None:
    step = Step(seed)
    generator = torch.Generator().manual_seed(seed)
    places_N = torch.randperm(len(step.of_N), generator=generator)
    shuffled = step.loss(policy_loss, places_N, torch.randperm(5, generator=generator))
    torch.testing.assert_close(shuffled, step.loss(policy_loss)[:, places_N])


@every_loss
@given(seed=seeds)
@few
def test_masked_tokens_change_no_loss(policy_loss: str, seed: int) -> None:
    step = Step(seed)
    before = step.loss(policy_loss)
    for values_N in (step.log_probs_N, step.old_N, step.advantages_N):
        values_N[~step.mask_N] = math.nan
    torch.testing.assert_close(step.loss(policy_loss), before)
    assert (before[:, ~step.mask_N] == 0).all()


@every_loss
@given(seed=seeds)
@few
def test_the_loss_is_homogeneous_in_the_advantage(policy_loss: str, seed: int) -> None:
    step = Step(seed)
    before = step.loss(policy_loss)
    step.advantages_N *= 3
    torch.testing.assert_close(step.loss(policy_loss), 3 * before)


@every_loss
@given(seed=seeds)
@few
def test_float32_is_near_float64(policy_loss: str, seed: int) -> None:
    found, exact = Step(seed, torch.float32).loss(policy_loss), Step(seed).loss(policy_loss)
    assert found.dtype == torch.float32
    # a ratio at the very edge may be clipped in one of the two
    assert ((found.double() - exact).abs() < 1e-4).double().mean() > 0.9 or not exact.numel()


@every_loss
def test_on_policy_every_loss_has_the_policy_gradient(policy_loss: str) -> None:
    step = Step(3)
    step.log_probs_N = step.old_N.clone()
    gradient_N = step.loss(policy_loss)[1]
    torch.testing.assert_close(gradient_N, torch.where(step.mask_N, -step.advantages_N, 0.0))
