"""Sampled estimates of KL(S||ref) and losses that have its gradient.

With ``x = log S(a) - log ref(a)`` and ``a ~ S``: k1 = x, k2 = x^2/2, k3 = exp(-x) + x - 1 (J. Schulman, "Approximating
KL divergence", 2020). As values k1 and k3 are unbiased. As losses they are not interchangeable with it: backpropagated
as they stand, k1 has expected gradient 0 and k3 that of KL(ref||S). :func:`kl_loss` gives the forms that are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_megatron.objectives.log_probs import LOG_RATIO_LIMIT, floor_log_probs, importance_ratio


def kl_estimate(kind: str, log_ratio: Tensor) -> Tensor:
    """Estimate ``kind`` (k1, k2 or k3) from ``log_ratio = log S - log ref`` of tokens sampled from S; any shape.

    The exponent inside k3 is limited to 20, its linear term is not. Raises ``ValueError`` on another ``kind``.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(-log_ratio.clamp(min=-LOG_RATIO_LIMIT)) + log_ratio
    raise ValueError(f"unknown KL estimator {kind!r}, expected k1, k2 or k3")


def kl_loss(kind: str, log_probs_N: Tensor, ref_log_probs_N: Tensor, old_log_probs_N: Tensor) -> Tensor:
    """Loss ``[N]`` whose expected gradient over tokens from the old policy is that of KL(S||ref).

    With the importance ratio ``r = S / S_old`` and sg() for "detached": ``r * k1``, ``sg(r) * k2``, ``r * k3``. The
    gradient of k2 is ``x * grad log S`` already, so only the sampling has to be corrected; k1 and k3 need the gradient
    of the sampling law as well. Where the rollout is on-policy pass ``log_probs_N.detach()`` as the old ones; r is then
    1 and still differentiable. Reference log-probabilities are floored
    (:func:`~opd_megatron.objectives.log_probs.floor_log_probs`). Raises ``ValueError`` on an unknown ``kind``.
    """
    estimate_N = kl_estimate(kind, log_probs_N - floor_log_probs(ref_log_probs_N))
    ratio_N = importance_ratio(log_probs_N, old_log_probs_N)
    return (ratio_N.detach() if kind == "k2" else ratio_N) * estimate_N
