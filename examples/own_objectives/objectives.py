"""Objectives of your own, to copy from: an advantage estimator and a policy loss.

    python train.py ... --custom-advantage-path examples.own_objectives.objectives:median_baseline \
        --custom-loss-path examples.own_objectives.objectives:soft_clip
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.estimators import RewardBatch
from opd_megatron.objectives.log_probs import importance_ratio
from opd_megatron.objectives.policy_loss import PolicyTerms


def median_baseline(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """``r`` minus the median reward of the prompt's samples, the same for all tokens of a response.

    An estimator gets the whole rollout and returns one float ``[T]`` tensor per sample. Masking, whitening
    (--normalize-advantages) and the distillation term follow after it.
    """
    rewards_B = batch.shaped_rewards(options)  # with the KL of --kl-coef
    group_of_B = batch.groups().of_B
    advantages_B = torch.zeros_like(rewards_B)
    for group in group_of_B.unique():
        members = group_of_B == group
        advantages_B[members] = rewards_B[members] - rewards_B[members].median()
    return batch.spread(advantages_B)


def soft_clip(terms: PolicyTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """``-tanh((r - 1) / eps) * eps * A``: the ratio loses its pull smoothly as it leaves 1.

    A loss gets log-probabilities with a gradient, old ones and finished advantages, ``[N]`` each, and returns a loss
    and metrics of the same shape. Weights, sums over micro-batches, the KL loss and the entropy bonus follow after it.
    """
    distance_N = importance_ratio(terms.log_probs_N, terms.old_log_probs_N) - 1
    eps = terms.options.eps_clip
    loss_N = -eps * torch.tanh(distance_N / eps) * terms.advantages_N
    return loss_N, {"train/ratio_distance": distance_N.abs()}
