"""Objectives that the tests name by import path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.estimators import RewardBatch
from opd_megatron.objectives.policy_loss import PolicyTerms

seen: list[PolicyTerms] = []


def keep_terms(terms: PolicyTerms) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy gradient without a ratio; what it was given can be looked at in ``seen``."""
    seen.append(terms)
    return -terms.advantages_N * terms.log_probs_N, {"train/own_metric": terms.advantages_N.abs()}


def ranks(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    """The place of a response among all rewards, from -1 to 1."""
    places_B = batch.rewards_B.argsort().argsort().double()
    return batch.spread(2 * places_B / max(len(places_B) - 1, 1) - 1)


def too_few(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    return batch.spread(batch.rewards_B)[1:]


def too_long(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    return [torch.zeros(len(mask_T) + 1) for mask_T in batch.loss_masks]


def not_finite(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    return batch.spread(batch.rewards_B / 0)


def a_scalar(terms: PolicyTerms) -> Any:
    return terms.log_probs_N.sum(), {}


def badly_named(terms: PolicyTerms) -> Any:
    return terms.log_probs_N, {"mine": terms.log_probs_N}


def beyond_float32(batch: RewardBatch, options: ObjectiveOptions) -> list[Tensor]:
    return batch.spread(batch.rewards_B * 1e39)


def nothing(*arguments: Any) -> None:
    """What a function gives whose ``return`` was forgotten."""


def a_loss_alone(terms: PolicyTerms) -> Any:
    return terms.log_probs_N


def detached(terms: PolicyTerms) -> Any:
    return terms.log_probs_N.detach(), {}
