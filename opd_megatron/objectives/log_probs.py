"""Differences and ratios of log-probabilities that stay finite.

The advantage and the KL in the reward need ``log p - log q``, which is infinite where a model gives a token
probability 0 (a masked logit, an underflow). Both functions here say exactly what is put in its place.
"""

from __future__ import annotations

import math

from torch import Tensor

LOG_PROB_FLOOR = -149 * math.log(2.0)
"""Log of the smallest positive float32 number, about -103.28."""

LOG_RATIO_LIMIT = 20.0
"""Largest exponent of an importance ratio or of k3; ``exp`` of it is 4.9e8."""


def floor_log_probs(log_probs: Tensor) -> Tensor:
    """Raise log-probabilities below :data:`LOG_PROB_FLOOR` to it, ``-inf`` included; NaN stays NaN.

    A probability that float32 cannot tell from 0 counts as the smallest that it can. The order of tokens is kept and
    a token that the teacher rules out is still pushed away with all the force float32 can express; a training step
    survives it, which with an infinite advantage it would not. The result is detached: a floor inside a
    differentiable expression would cut the gradient where it is needed most.
    """
    return log_probs.detach().clamp(min=LOG_PROB_FLOOR)


def log_ratio(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """``log p - log q`` of the sampled tokens, detached, with both floored; always finite unless an input is NaN.

    With tokens sampled from ``p`` this is k1, the unbiased estimate of KL(p||q). It is the ``d_t`` of the distillation
    term (p student, q teacher) and the per-token KL of ``--kl-coef`` (p policy, q reference). Any shape.
    """
    return floor_log_probs(log_probs) - floor_log_probs(other_log_probs)


def importance_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """``p(a) / p_old(a)``, differentiable in ``log_probs``; any shape.

    The exponent is limited to :data:`LOG_RATIO_LIMIT` so that float32 cannot overflow; beyond it the gradient is 0.
    """
    return (log_probs - old_log_probs.detach()).clamp(max=LOG_RATIO_LIMIT).exp()
