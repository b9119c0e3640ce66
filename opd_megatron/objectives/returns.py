"""Sums over the time steps of one response; only its unmasked tokens are steps.

Shape legend: ``U`` unmasked tokens of a response.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def generalized_advantages(
    rewards_U: Tensor, values_U: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv 1506.02438): advantages ``[U]`` and the returns ``advantages + values`` a critic learns, ``[U]``.

    ``A_u = sum_k (gamma lambda)^k delta_{u+k}`` with ``delta_u = r_u + gamma V_{u+1} - V_u`` and ``V`` 0 after the last
    unmasked token, where the response ends. ``values_U`` are the critic's before each token. At lambda 1 the advantage
    is the discounted return minus the value, at lambda 0 the one-step error. Detached.
    """
    values_U = values_U.detach()
    following_U = torch.cat([values_U[1:], values_U.new_zeros(min(1, len(values_U)))])
    advantages_U = discounted_returns(rewards_U + gamma * following_U - values_U, gamma * gae_lambda)
    return advantages_U, advantages_U + values_U
