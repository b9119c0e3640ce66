from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.advantages import task_advantages, whiten
from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.estimators import ADVANTAGE_ESTIMATORS
from opd_megatron.objectives.kl import KL_LOSSES
from opd_megatron.objectives.policy_loss import POLICY_LOSSES
from opd_megatron.objectives.returns import discounted_returns
from opd_megatron.sample import LARGEST_REWARD

ESTIMATORS = sorted(ADVANTAGE_ESTIMATORS)


def random_rollout(seed: int, groups: tuple[int, ...] = (3, 1, 5, 2)) -> tuple[list[float], list[int], list[Tensor]]:
    """Rewards, interleaved group indices and masks with holes; one response is empty, one wholly masked."""
    rng = random.Random(seed)
    group_indices = [index * 10 for index, size in enumerate(groups) for _ in range(size)]
    rng.shuffle(group_indices)
    rewards = [rng.uniform(-1, 2) for _ in group_indices]
    masks = [torch.tensor([rng.random() < 0.7 for _ in range(rng.randint(1, 9))]) for _ in group_indices]
    masks[2] = torch.zeros(0, dtype=torch.bool)
    masks[4] = torch.zeros(3, dtype=torch.bool)
    return rewards, group_indices, masks


def naive_group(rewards: list[float], group_indices: list[int], divide: bool) -> list[float]:
    out = []
    for reward, index in zip(rewards, group_indices, strict=True):
        members = [r for r, i in zip(rewards, group_indices, strict=True) if i == index]
        value = reward - statistics.fmean(members)
        if divide:
            value /= (statistics.stdev(members) if len(members) > 1 else 0.0) + 1e-6
        out.append(value)
    return out


def naive_whiten(
    advantages: list[list[float]], masks: list[Tensor], group_indices: list[int] | None = None
) -> list[list[float]]:
    """With ``group_indices``, of an estimator that compares samples: one that is alone counts, and has 0."""
    kept = [
        a for row, mask in zip(advantages, masks, strict=True) for a, m in zip(row, mask.tolist(), strict=True) if m
    ]
    mean, variance = statistics.fmean(kept), statistics.variance(kept)
    whitened = [[(a - mean) / math.sqrt(variance + 1e-8) for a in row] for row in advantages]
    alone = [group_indices is not None and group_indices.count(index) == 1 for index in group_indices or whitened]
    return [[0.0] * len(row) if lone else row for row, lone in zip(whitened, alone, strict=True)]


def naive_returns(reward: float, mask: list[bool], kls: list[float], kl_coef: float, gamma: float) -> list[float]:
    steps = [t for t, m in enumerate(mask) if m]
    earned = {t: -kl_coef * kls[t] + (reward if t == steps[-1] else 0.0) for t in steps}
    out = [0.0] * len(mask)
    for here, t in enumerate(steps):
        out[t] = sum(gamma**distance * earned[u] for distance, u in enumerate(steps[here:]))
    return out


def spread(values: list[float], masks: list[Tensor]) -> list[list[float]]:
    return [[value] * len(mask) for value, mask in zip(values, masks, strict=True)]


def assert_advantages(got: list[Tensor], expected: list[list[float]], masks: list[Tensor]) -> None:
    assert len(got) == len(masks)
    for got_T, row, mask_T in zip(got, expected, masks, strict=True):
        assert got_T.dtype == torch.float32
        assert got_T.shape == mask_T.shape
        reference_T = torch.where(mask_T, torch.tensor(row, dtype=torch.float64), 0.0).float()
        torch.testing.assert_close(got_T, reference_T, rtol=1e-6, atol=1e-7)


def greedy_rewards(estimator: str, group_indices: list[int]) -> list[float] | None:
    """A reward for each prompt's greedy response, where it is asked for."""
    return [0.1 * (index + 1) for index in group_indices] if ADVANTAGE_ESTIMATORS[estimator].needs_greedy else None


NAIVE: dict[str, Callable[[float, list[float], int, list[int]], float]] = {
    "rloo": lambda reward, group, place, lengths: (
        reward - statistics.fmean(group[:place] + group[place + 1 :]) if len(group) > 1 else 0.0
    ),
    "opo": lambda reward, group, place, lengths: (
        reward - sum(length * r for length, r in zip(lengths, group, strict=True)) / max(sum(lengths), 1)
    ),
}


@pytest.mark.parametrize("estimator", sorted(NAIVE))
def test_baselines_of_uneven_interleaved_groups(estimator: str) -> None:
    rewards, groups, masks = random_rollout(11)
    expected = []
    for sample, index in enumerate(groups):
        members = [place for place, other in enumerate(groups) if other == index]
        lengths = [int(masks[place].sum()) for place in members]
        group = [rewards[place] for place in members]
        expected.append(NAIVE[estimator](rewards[sample], group, members.index(sample), lengths))
    got = task_advantages(ObjectiveOptions(advantage_estimator=estimator), rewards, groups, masks)
    assert_advantages(got, spread(expected, masks), masks)


def test_remax_compares_with_the_greedy_response_of_the_prompt() -> None:
    rewards, groups, masks = random_rollout(12)
    greedy = greedy_rewards("remax", groups)
    assert greedy is not None
    options = ObjectiveOptions(advantage_estimator="remax")
    expected = spread([reward - base for reward, base in zip(rewards, greedy, strict=True)], masks)
    assert_advantages(task_advantages(options, rewards, groups, masks, None, greedy), expected, masks)
    with pytest.raises(ValueError, match="greedy response to each prompt"):
        task_advantages(options, rewards, groups, masks)
    with pytest.raises(ValueError, match="1 greedy rewards for 11 samples"):
        task_advantages(options, rewards, groups, masks, None, [0.0])


def test_gpg_scales_by_groups_with_unequal_rewards_and_not_by_rewards() -> None:
    """Four prompts: one with a signal, one alone, two that agree, one of these on a reward of 1."""
    masks = [torch.ones(2, dtype=torch.bool)] * 7
    rewards, groups = [1.0, 0.0, 5.0, 0.0, 0.0, 1.0, 1.0], [3, 3, 4, 5, 5, 6, 6]
    got = task_advantages(ObjectiveOptions(advantage_estimator="gpg"), rewards, groups, masks)
    assert_advantages(got, spread([4 * 0.5, -4 * 0.5, 0.0, 0.0, 0.0, 0.0, 0.0], masks), masks)


def test_equal_rewards_leave_no_trace_of_rounding() -> None:
    """0.1 three times has not the mean 0.1; the standard deviation of what is left would blow it up."""
    masks = [torch.ones(1, dtype=torch.bool)] * 3
    for estimator in ("grpo", "rloo", "gpg"):
        options = ObjectiveOptions(advantage_estimator=estimator)
        assert [a.item() for a in task_advantages(options, [0.1] * 3, [0] * 3, masks)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("option", "catalogue"),
    [("advantage_estimator", ADVANTAGE_ESTIMATORS), ("policy_loss", POLICY_LOSSES), ("kl_loss_type", KL_LOSSES)],
)
def test_the_catalogues_hold_the_choices_of_the_flags(option: str, catalogue: Catalogue[Any]) -> None:
    (choices,) = (f.metadata["choices"] for f in fields(ObjectiveOptions) if f.name == option)
    assert set(choices) == set(catalogue)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("whitened", [True, False])
def test_grpo_with_uneven_interleaved_groups(divide: bool, whitened: bool) -> None:
    rewards, groups, masks = random_rollout(1)
    options = ObjectiveOptions(disable_grpo_std_normalization=not divide, normalize_advantages=whitened)
    expected = spread(naive_group(rewards, groups, divide), masks)
    if whitened:
        expected = naive_whiten(expected, masks, groups)
    assert_advantages(task_advantages(options, rewards, groups, masks), expected, masks)


def test_grpo_of_a_known_group() -> None:
    mask = torch.ones(1, dtype=torch.bool)
    got = task_advantages(ObjectiveOptions(), [1.0, 0.0, 0.0, 1.0], [7, 7, 7, 7], [mask] * 4)
    assert [a.item() for a in got] == pytest.approx([0.5 / (math.sqrt(1 / 3) + 1e-6) * s for s in (1, -1, -1, 1)])


def test_a_group_of_one_has_advantage_zero() -> None:
    masks = [torch.ones(2, dtype=torch.bool)] * 3
    for estimator in (name for name in ESTIMATORS if ADVANTAGE_ESTIMATORS[name].compares_samples):
        options = ObjectiveOptions(advantage_estimator=estimator)
        assert all((a == 0).all() for a in task_advantages(options, [1.0, 0.3, -2.0], [0, 1, 2], masks))
    mixed = task_advantages(ObjectiveOptions(), [5.0, 1.0, 0.0], [1, 0, 0], masks)
    assert [a.sign().tolist() for a in mixed] == [[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if ADVANTAGE_ESTIMATORS[name].compares_samples])
def test_whitening_says_nothing_of_a_sample_alone(estimator: str) -> None:
    """Lengths 1 and 3 of the others make a mean other than 0, which whitening subtracts of every token."""
    masks = [torch.ones(length, dtype=torch.bool) for length in (2, 1, 3)]
    options = ObjectiveOptions(advantage_estimator=estimator, normalize_advantages=True)
    got = task_advantages(options, [5.0, 1.0, 0.0], [0, 1, 1], masks)
    assert got[0].tolist() == [0.0, 0.0]
    assert got[1].item() > 0 > got[2][0]
    if estimator == "reinforce_plus_plus_baseline":  # 0, 0, 1/2, -1/2, -1/2, -1/2 whitened: the sample alone counts
        assert got[1].item() == pytest.approx((0.5 + 1 / 6) / math.sqrt((1 - 1 / 6) / 5 + 1e-8))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("normalize", [True, False])
def test_reinforce_plus_plus_against_a_loop_over_tokens(gamma: float, kl_coef: float, normalize: bool) -> None:
    rewards, groups, masks = random_rollout(2)
    generator = torch.Generator().manual_seed(3)
    kls = [torch.where(m, torch.randn(len(m), generator=generator), math.nan) for m in masks]
    options = ObjectiveOptions(
        advantage_estimator="reinforce_plus_plus", gamma=gamma, kl_coef=kl_coef, normalize_advantages=normalize
    )
    returns = [
        naive_returns(r, m.tolist(), k.tolist(), kl_coef, gamma) for r, m, k in zip(rewards, masks, kls, strict=True)
    ]
    # Whitened once, whether or not --normalize-advantages asks for it too.
    assert_advantages(task_advantages(options, rewards, groups, masks, kls), naive_whiten(returns, masks), masks)


def test_discounting_skips_masked_tokens() -> None:
    mask = torch.tensor([True, False, False, True, True, False])
    other = torch.tensor([True])
    options = ObjectiveOptions(advantage_estimator="reinforce_plus_plus", gamma=0.5)
    first, second = task_advantages(options, [8.0, 0.0], [0, 1], [mask, other])
    assert first[[1, 2, 5]].tolist() == [0.0, 0.0, 0.0]
    # Differences of whitened returns 2, 4, 8 (and 0 of the other sample) keep their proportions.
    returns = torch.stack([first[0], first[3], first[4]]) - second[0]
    torch.testing.assert_close(returns / returns[2], torch.tensor([0.25, 0.5, 1.0]))


@pytest.mark.parametrize("length", [0, 1, 2, 7, 64, 65])
def test_discounted_returns_of_any_length(length: int) -> None:
    rewards_U = torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    expected, following = [], 0.0
    for reward in reversed(rewards_U.tolist()):
        following = reward + 0.97 * following
        expected.append(following)
    before = rewards_U.clone()
    got = discounted_returns(rewards_U, 0.97)
    torch.testing.assert_close(got, torch.tensor(expected[::-1], dtype=torch.float64))
    assert torch.equal(rewards_U, before)


def test_reinforce_plus_plus_baseline() -> None:
    rewards, groups, masks = random_rollout(4)
    options = ObjectiveOptions(advantage_estimator="reinforce_plus_plus_baseline", normalize_advantages=True)
    expected = naive_whiten(spread(naive_group(rewards, groups, divide=False), masks), masks, groups)
    assert_advantages(task_advantages(options, rewards, groups, masks), expected, masks)


def test_kl_in_the_reward_of_group_estimators_counts_unmasked_tokens_before_the_group_statistics() -> None:
    rewards, groups, masks = random_rollout(5)
    generator = torch.Generator().manual_seed(6)
    kls = [torch.where(m, torch.randn(len(m), generator=generator), math.inf) for m in masks]
    shaped = [r - 0.2 * k[m].sum().item() for r, k, m in zip(rewards, kls, masks, strict=True)]
    grpo = task_advantages(ObjectiveOptions(kl_coef=0.2), rewards, groups, masks, kls)
    assert_advantages(grpo, spread(naive_group(shaped, groups, divide=True), masks), masks)
    without = task_advantages(ObjectiveOptions(kl_coef=0.0), rewards, groups, masks, kls)
    assert_advantages(without, spread(naive_group(rewards, groups, divide=True), masks), masks)


@pytest.mark.parametrize("normalize", [True, False])
def test_none_is_zero(normalize: bool) -> None:
    rewards, groups, masks = random_rollout(7)
    options = ObjectiveOptions(advantage_estimator="none", normalize_advantages=normalize)
    assert_advantages(task_advantages(options, rewards, groups, masks), spread([0.0] * len(masks), masks), masks)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_within_groups_of_equal_length_give_nothing_to_learn(estimator: str, normalize: bool) -> None:
    options = ObjectiveOptions(advantage_estimator=estimator, normalize_advantages=normalize)
    masks = [torch.ones(3, dtype=torch.bool)] * 6
    greedy = [0.1] * 6 if ADVANTAGE_ESTIMATORS[estimator].needs_greedy else None
    values = [torch.full((3,), 0.1, dtype=torch.float64)] * 6 if ADVANTAGE_ESTIMATORS[estimator].needs_values else None
    for advantage_T in task_advantages(options, [0.1] * 6, [0, 0, 0, 1, 1, 1], masks, None, greedy, values):
        assert advantage_T.abs().max() < 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1]])
def test_rollouts_with_fewer_than_two_tokens(estimator: str, lengths: list[int]) -> None:
    options = ObjectiveOptions(advantage_estimator=estimator, normalize_advantages=True, gamma=0.9)
    masks = [torch.ones(length, dtype=torch.bool) for length in lengths]
    rewards = [1.0] * len(lengths)
    greedy = rewards if ADVANTAGE_ESTIMATORS[estimator].needs_greedy else None
    values = masks if ADVANTAGE_ESTIMATORS[estimator].needs_values else None
    got = task_advantages(options, rewards, list(range(len(lengths))), masks, None, greedy, values)
    assert [a.tolist() for a in got] == [[0.0] * length for length in lengths]


def test_arrays_that_cannot_be_written_are_taken_too(recwarn: pytest.WarningsRecorder) -> None:
    mask = np.array([True, False, True])
    kl = np.array([0.5, np.nan, 0.25], dtype=np.float32)
    mask.flags.writeable = kl.flags.writeable = False
    first, second = task_advantages(ObjectiveOptions(kl_coef=1.0), [1.0, 1.0], [0, 0], [mask, mask], [kl, 3 * kl])
    assert first[0] > 0 > second[0]
    assert first[1] == second[1] == 0
    assert not recwarn.list


def test_whitening_uses_unmasked_tokens_only() -> None:
    advantages = [torch.tensor([1.0, 1e9, 3.0], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)]
    masks = [torch.tensor([True, False, True]), torch.tensor([True])]
    first, second = whiten(advantages, masks)
    torch.testing.assert_close(torch.cat([first, second]), torch.tensor([-1.0, 0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "opo", "gpg", "reinforce_plus_plus", "ppo"])
def test_no_reward_that_is_let_through_is_too_large_for_the_statistics(estimator: str, whitened: bool) -> None:
    """Of the size of the largest float32 the advantages are those of rewards of size 1, rescaled or normalised."""
    rewards, groups = [-1.0, 1.0, 0.25, 0.5, 0.0], [0, 0, 1, 1, 1]
    masks = [torch.ones(2, dtype=torch.bool)] * 5
    options = ObjectiveOptions(advantage_estimator=estimator, normalize_advantages=whitened)
    large = LARGEST_REWARD / 4
    small_A, large_A = (
        torch.cat(
            task_advantages(options, [size * r for r in rewards], groups, masks, values=[torch.zeros(2)] * 5)
        ).double()
        for size in (1.0, large)
    )
    scale = 1.0 if whitened or estimator in ("grpo", "reinforce_plus_plus") else large
    torch.testing.assert_close(large_A / scale, small_A, rtol=1e-5, atol=1e-6)
    assert (small_A != 0).any()


def test_faults_name_what_is_wrong() -> None:
    mask = torch.ones(2, dtype=torch.bool)
    kl = ObjectiveOptions(kl_coef=0.1)
    with pytest.raises(ValueError, match="2 rewards, 1 group"):
        task_advantages(ObjectiveOptions(), [1.0, 2.0], [0], [mask, mask])
    with pytest.raises(ValueError, match="reward of sample 1 is nan"):
        task_advantages(ObjectiveOptions(), [1.0, math.nan], [0, 0], [mask, mask])
    with pytest.raises(ValueError, match="no KL"):
        task_advantages(kl, [1.0], [0], [mask])
    with pytest.raises(ValueError, match="sample 0 has 2 response tokens but 3"):
        task_advantages(kl, [1.0], [0], [mask], [torch.zeros(3)])
    with pytest.raises(ValueError, match="sample 0 is not finite"):
        task_advantages(kl, [1.0], [0], [mask], [torch.tensor([0.0, math.inf])])
    with pytest.raises(ValueError, match="kl_coef needs a reward"):
        task_advantages(ObjectiveOptions(kl_coef=0.1, advantage_estimator="none"), [1.0], [0], [mask], [mask])
