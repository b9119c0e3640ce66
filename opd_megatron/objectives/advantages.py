"""Task advantages: what the rewards of a rollout say about each response token.

They are computed once per rollout over all of its samples, before any of them is sent to a trainer rank, so that no
parallel layout, micro-batch or optimizer step can change a mean or a standard deviation. The distillation term is not
part of them: it is added in the loss (:mod:`opd_megatron.objectives.opd`), after the normalisation done here.

Shape legend: ``B`` samples of the rollout, ``T`` response tokens of one sample (differs by sample, may be 0),
``U`` its unmasked tokens. Calculations are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.config.user_code import load_function
from opd_megatron.objectives.estimators import ADVANTAGE_ESTIMATORS, AdvantageEstimator, RewardBatch, critic_returns
from opd_megatron.objectives.tensors import TokenArray, as_float64, as_mask

WHITENING_EPSILON = 1e-8
"""Added to the variance of whitened advantages, inside the root."""


def chosen_estimator(options: ObjectiveOptions) -> AdvantageEstimator:
    """That of ``--advantage-estimator``, or the user's own.

    ``--custom-advantage-path`` names a function ``(RewardBatch, ObjectiveOptions) -> advantages``, one float ``[T]``
    tensor or array per sample; its results are normalised and masked like all others. Raises ``UserError`` if it cannot
    be imported.
    """
    path = options.custom_advantage_path
    if path is None:
        return ADVANTAGE_ESTIMATORS[options.advantage_estimator]
    function = load_function(path, "--custom-advantage-path")

    def estimate(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
        answer: Any = function(batch, options)
        try:
            advantages = [as_float64(advantage_T) for advantage_T in answer]
        except (TypeError, ValueError):
            kind = type(answer).__name__
            raise UserError(f"{path}: returned a {kind}, not one tensor of numbers for each sample") from None
        if len(advantages) != len(batch.loss_masks):
            raise UserError(f"{path}: {len(advantages)} advantages for {len(batch.loss_masks)} samples")
        for place, (advantage_T, mask_T) in enumerate(zip(advantages, batch.loss_masks, strict=True)):
            if advantage_T.shape != mask_T.shape:
                raise UserError(
                    f"{path}: advantages of shape {tuple(advantage_T.shape)} for the {len(mask_T)} tokens "
                    f"of sample {place}"
                )
            if not advantage_T[mask_T].float().isfinite().all():
                raise UserError(f"{path}: the advantages of sample {place} are not finite")
        return advantages

    return AdvantageEstimator(estimate)


def task_advantages(
    options: ObjectiveOptions,
    rewards: Sequence[float],
    group_indices: Sequence[int],
    loss_masks: Sequence[TokenArray],
    kls: Sequence[TokenArray] | None = None,
    greedy_rewards: Sequence[float] | None = None,
    values: Sequence[TokenArray] | None = None,
) -> list[Tensor]:
    """Advantages of all samples of a rollout: one float32 ``[T]`` per sample, 0 where its loss mask is 0.

    ``kls`` are per-token estimates of KL(policy||reference) on the sampled tokens
    (:func:`~opd_megatron.objectives.log_probs.log_ratio`); they are needed where ``options.kl_coef`` > 0. The reward
    then becomes ``r - kl_coef * sum_t kl_t`` over unmasked tokens, before any group statistic; ``reinforce_plus_plus``
    spends it token by token. That is the reward whose policy gradient maximises
    ``E[r] - kl_coef * KL(policy||reference)`` of whole responses (at gamma 1). Adding ``-kl_coef * kl_t`` to a
    group-normalised advantage instead would divide only one of the two terms by the group's standard deviation and
    leave out the effect of a token on the KL of those that follow it. ``greedy_rewards`` are those of the greedy
    response to each sample's prompt and ``values`` the critic's before each token, for estimators that need them.

    Raises ``ValueError`` when lengths disagree, a reward, an unmasked KL or value is not finite, or ``kl_coef`` has
    nothing to act on, and ``UserError`` where a function of the user's own returns what is no advantage.
    """
    estimator = chosen_estimator(options)
    if options.kl_coef > 0 and not estimator.takes_kl:
        raise ValueError(f"kl_coef needs a reward; advantage_estimator {options.advantage_estimator} has none")
    batch = _reward_batch(options, rewards, group_indices, loss_masks, kls, greedy_rewards, values)
    advantages = estimator.estimate(batch, options)
    if options.normalize_advantages or estimator.always_whitened:
        advantages = whiten(advantages, batch.loss_masks)
        if estimator.compares_samples:
            advantages = _without_lone_samples(advantages, batch)
    return [
        torch.where(mask_T, advantage_T, 0.0).float()
        for advantage_T, mask_T in zip(advantages, batch.loss_masks, strict=True)
    ]


def critic_targets(
    options: ObjectiveOptions,
    rewards: Sequence[float],
    loss_masks: Sequence[TokenArray],
    values: Sequence[TokenArray],
    kls: Sequence[TokenArray] | None = None,
) -> list[Tensor]:
    """Returns that a critic with ``values`` is to learn: one float32 ``[T]`` per sample, 0 where its loss mask is 0.

    They are advantages plus values before any normalisation, of the task's reward and ``kls`` alone: no distillation
    term is in them. Arguments and errors are those of :func:`task_advantages`.
    """
    batch = _reward_batch(options, rewards, list(range(len(rewards))), loss_masks, kls, None, values)
    return [returns_T.float() for returns_T in critic_returns(batch, options)]


def _reward_batch(
    options: ObjectiveOptions,
    rewards: Sequence[float],
    group_indices: Sequence[int],
    loss_masks: Sequence[TokenArray],
    kls: Sequence[TokenArray] | None,
    greedy_rewards: Sequence[float] | None,
    values: Sequence[TokenArray] | None,
) -> RewardBatch:
    if not len(rewards) == len(group_indices) == len(loss_masks):
        raise ValueError(
            f"{len(rewards)} rewards, {len(group_indices)} group indices and {len(loss_masks)} loss masks "
            "do not describe the same samples"
        )
    if greedy_rewards is not None and len(greedy_rewards) != len(rewards):
        raise ValueError(f"{len(greedy_rewards)} greedy rewards for {len(rewards)} samples")
    for position, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"the reward of sample {position} is {reward}")
    masks = [as_mask(mask_T) for mask_T in loss_masks]
    if options.kl_coef == 0:
        kept_kls = [torch.zeros(len(mask_T), dtype=torch.float64) for mask_T in masks]
    elif kls is None:
        raise ValueError(f"kl_coef is {options.kl_coef} but no KL to the reference was given")
    else:
        kept_kls = _unmasked("KL to the reference", kls, masks)
    kept_values = None if values is None else _unmasked("critic's value", values, masks)
    greedy_B = None if greedy_rewards is None else torch.tensor(greedy_rewards, dtype=torch.float64)
    return RewardBatch(
        torch.tensor(rewards, dtype=torch.float64), group_indices, masks, kept_kls, greedy_B, kept_values
    )


def _unmasked(what: str, arrays: Sequence[TokenArray], masks: Sequence[Tensor]) -> list[Tensor]:
    """One float64 ``[T]`` per sample, 0 at masked tokens."""
    kept = []
    for position, (array, mask_T) in enumerate(zip(arrays, masks, strict=True)):
        values_T = as_float64(array)
        if values_T.shape != mask_T.shape:
            raise ValueError(
                f"sample {position} has {len(mask_T)} response tokens but {len(values_T)} numbers for the {what}"
            )
        values_T = torch.where(mask_T, values_T, 0.0)
        if not values_T.isfinite().all():
            raise ValueError(f"the {what} of sample {position} is not finite at an unmasked token")
        kept.append(values_T)
    return kept


def _without_lone_samples(advantages: Sequence[Tensor], batch: RewardBatch) -> list[Tensor]:
    """0 for samples alone with their prompt: whitening has moved their advantage of 0 by the mean of the rollout's.

    They are tokens of the rollout all the same and count in the mean and the variance, as those of a prompt do whose
    samples all earned the same.
    """
    groups = batch.groups()
    alone_B = groups.size_G[groups.of_B] == 1
    return [
        torch.zeros_like(advantage_T) if alone else advantage_T
        for advantage_T, alone in zip(advantages, alone_B.tolist(), strict=True)
    ]


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
