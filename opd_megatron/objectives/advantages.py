"""Task advantages: what the rewards of a rollout say about each response token.

They are computed once per rollout over all of its samples, before any of them is sent to a trainer rank, so that no
parallel layout, micro-batch or optimizer step can change a mean or a standard deviation. The distillation term is not
part of them: it is added in the loss (:mod:`opd_megatron.objectives.opd`), after the normalisation done here.

Shape legend: ``B`` samples of the rollout, ``T`` response tokens of one sample (differs by sample, may be 0),
``U`` its unmasked tokens. Calculations are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.tensors import TokenArray, as_float64, as_mask

STD_EPSILON = 1e-6
"""Added to the standard deviation of a group's rewards."""

WHITENING_EPSILON = 1e-8
"""Added to the variance of whitened advantages, inside the root."""


@dataclass(frozen=True)
class RewardBatch:
    """What an estimator sees of one rollout; ``kls`` hold 0 at masked tokens, and everywhere without a KL."""

    rewards_B: Tensor
    group_indices: Sequence[int]
    loss_masks: Sequence[Tensor]
    kls: Sequence[Tensor]


@dataclass(frozen=True)
class AdvantageEstimator:
    """``estimate`` gives one ``[T]`` float64 advantage per sample; its values at masked tokens are ignored."""

    estimate: Callable[[RewardBatch, ObjectiveOptions], list[Tensor]]
    always_whitened: bool = False
    """Whitening belongs to the method, whatever ``--normalize-advantages`` says."""
    takes_kl: bool = True
    """The method has a reward that ``--kl-coef`` can shape."""


def task_advantages(
    options: ObjectiveOptions,
    rewards: Sequence[float],
    group_indices: Sequence[int],
    loss_masks: Sequence[TokenArray],
    kls: Sequence[TokenArray] | None = None,
) -> list[Tensor]:
    """Advantages of all samples of a rollout: one float32 ``[T]`` per sample, 0 where its loss mask is 0.

    ``kls`` are per-token estimates of KL(policy||reference) on the sampled tokens
    (:func:`~opd_megatron.objectives.log_probs.log_ratio`); they are needed where ``options.kl_coef`` > 0. The reward
    then becomes ``r - kl_coef * sum_t kl_t`` over unmasked tokens, before any group statistic; ``reinforce_plus_plus``
    spends it token by token. That is the reward whose policy gradient maximises
    ``E[r] - kl_coef * KL(policy||reference)`` of whole responses (at gamma 1). Adding ``-kl_coef * kl_t`` to a
    group-normalised advantage instead would divide only one of the two terms by the group's standard deviation and
    leave out the effect of a token on the KL of those that follow it.

    Raises ``ValueError`` when lengths disagree, a reward or an unmasked KL is not finite, or ``kl_coef`` has nothing
    to act on.
    """
    estimator = ADVANTAGE_ESTIMATORS[options.advantage_estimator]
    if options.kl_coef > 0 and not estimator.takes_kl:
        raise ValueError(f"kl_coef needs a reward; advantage_estimator {options.advantage_estimator} has none")
    batch = _reward_batch(options, rewards, group_indices, loss_masks, kls)
    advantages = estimator.estimate(batch, options)
    if options.normalize_advantages or estimator.always_whitened:
        advantages = whiten(advantages, batch.loss_masks)
    return [
        torch.where(mask_T, advantage_T, 0.0).float()
        for advantage_T, mask_T in zip(advantages, batch.loss_masks, strict=True)
    ]


def _reward_batch(
    options: ObjectiveOptions,
    rewards: Sequence[float],
    group_indices: Sequence[int],
    loss_masks: Sequence[TokenArray],
    kls: Sequence[TokenArray] | None,
) -> RewardBatch:
    if not len(rewards) == len(group_indices) == len(loss_masks):
        raise ValueError(
            f"{len(rewards)} rewards, {len(group_indices)} group indices and {len(loss_masks)} loss masks "
            "do not describe the same samples"
        )
    for position, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"the reward of sample {position} is {reward}")
    masks = [as_mask(mask_T) for mask_T in loss_masks]
    if options.kl_coef == 0:
        kept_kls = [torch.zeros(len(mask_T), dtype=torch.float64) for mask_T in masks]
    elif kls is None:
        raise ValueError(f"kl_coef is {options.kl_coef} but no KL to the reference was given")
    else:
        kept_kls = [_unmasked_kl(i, kl, mask_T) for i, (kl, mask_T) in enumerate(zip(kls, masks, strict=True))]
    return RewardBatch(torch.tensor(rewards, dtype=torch.float64), group_indices, masks, kept_kls)


def _unmasked_kl(position: int, kl: TokenArray, mask_T: Tensor) -> Tensor:
    kl_T = as_float64(kl)
    if kl_T.shape != mask_T.shape:
        raise ValueError(f"sample {position} has {len(mask_T)} response tokens but {len(kl_T)} KL values")
    kl_T = torch.where(mask_T, kl_T, 0.0)
    if not kl_T.isfinite().all():
        raise ValueError(f"the KL to the reference of sample {position} is not finite at an unmasked token")
    return kl_T


def group_advantages(rewards_B: Tensor, group_indices: Sequence[int], divide_by_std: bool) -> Tensor:
    """Group-relative advantages of whole responses, ``[B]`` float64.

    ``(r - mean) / (std + 1e-6)`` over the samples that share a group index, with the unbiased standard deviation
    (GRPO, arXiv 2402.03300); without the division Dr. GRPO (arXiv 2503.20783). Groups may differ in size and lie in any
    order. A group of one has advantage 0. Responses without trained tokens count: their reward is part of the group.
    """
    rewards_B = rewards_B.double()
    _, group_B = torch.unique(torch.tensor(group_indices, dtype=torch.int64), return_inverse=True)
    size_G = torch.bincount(group_B).double()
    mean_G = torch.zeros_like(size_G).index_add_(0, group_B, rewards_B) / size_G
    centred_B = rewards_B - mean_G[group_B]
    if not divide_by_std:
        return centred_B
    squares_G = torch.zeros_like(size_G).index_add_(0, group_B, centred_B.square())
    std_G = (squares_G / (size_G - 1).clamp(min=1)).sqrt()
    return centred_B / (std_G[group_B] + STD_EPSILON)


def discounted_returns(rewards_U: Tensor, gamma: float) -> Tensor:
    """``G_u = r_u + gamma * G_{u+1}``, ``[U]``; only unmasked tokens are passed, so only they are steps of time."""
    returns_U = rewards_U.clone()
    step = 1
    # After each pass an entry sums twice as many rewards: log2(U) vector operations in place of U scalar ones.
    while step < len(returns_U):
        reach = gamma**step * returns_U[step:]
        returns_U[:-step] += reach
        step *= 2
    return returns_U


def whiten(advantages: Sequence[Tensor], loss_masks: Sequence[Tensor]) -> list[Tensor]:
    """``(A - mean) / sqrt(variance + 1e-8)`` over all unmasked tokens of the rollout, one ``[T]`` per sample.

    The variance is unbiased. With one unmasked token, where it does not exist, that token gets 0. Values at masked
    tokens take no part and come back as 0.
    """
    unmasked_U = torch.cat([a_T[m_T] for a_T, m_T in zip(advantages, loss_masks, strict=True)] or [torch.zeros(0)])
    if len(unmasked_U) < 2:
        return [torch.zeros_like(advantage_T) for advantage_T in advantages]
    scale = (unmasked_U.var(unbiased=True) + WHITENING_EPSILON).rsqrt()
    mean = unmasked_U.mean()
    return [
        torch.where(mask_T, (advantage_T - mean) * scale, 0.0)
        for advantage_T, mask_T in zip(advantages, loss_masks, strict=True)
    ]


def _shaped_rewards(batch: RewardBatch, options: ObjectiveOptions) -> Tensor:
    """``r - kl_coef * sum_t kl_t``, ``[B]``."""
    if not batch.kls:
        return batch.rewards_B
    return batch.rewards_B - options.kl_coef * torch.stack([kl_T.sum() for kl_T in batch.kls])


def _spread(values_B: Tensor, loss_masks: Sequence[Tensor]) -> list[Tensor]:
    """Give every token of a response the value of the response."""
    return [value.expand(len(mask_T)) for value, mask_T in zip(values_B, loss_masks, strict=True)]


def _grpo(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    divide_by_std = not options.disable_grpo_std_normalization
    values_B = group_advantages(_shaped_rewards(batch, options), batch.group_indices, divide_by_std)
    return _spread(values_B, batch.loss_masks)


def _reinforce_plus_plus(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """REINFORCE++ (arXiv 2501.03262): returns of token rewards, whitened over the batch.

    Token t earns ``-kl_coef * kl_t``, the last unmasked one also the reward of the response; the advantage is the
    return (the paper's discount is 1).
    """
    advantages = []
    for reward, mask_T, kl_T in zip(batch.rewards_B, batch.loss_masks, batch.kls, strict=True):
        rewards_U = -options.kl_coef * kl_T[mask_T]
        rewards_U[-1:] += reward
        advantage_T = torch.zeros_like(kl_T)
        advantage_T[mask_T] = discounted_returns(rewards_U, options.gamma)
        advantages.append(advantage_T)
    return advantages


def _reinforce_plus_plus_baseline(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """REINFORCE++-baseline (arXiv 2501.03262): the group's mean is subtracted, the scale is the whole batch's."""
    values_B = group_advantages(_shaped_rewards(batch, options), batch.group_indices, divide_by_std=False)
    return _spread(values_B, batch.loss_masks)


def _none(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """No task advantage: distillation alone."""
    return [torch.zeros_like(kl_T) for kl_T in batch.kls]


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "grpo": AdvantageEstimator(_grpo),
    "reinforce_plus_plus": AdvantageEstimator(_reinforce_plus_plus, always_whitened=True),
    "reinforce_plus_plus_baseline": AdvantageEstimator(_reinforce_plus_plus_baseline, always_whitened=True),
    "none": AdvantageEstimator(_none, takes_kl=False),
}
"""The choices of ``--advantage-estimator``."""
