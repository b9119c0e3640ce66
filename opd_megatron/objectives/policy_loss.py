"""The clipped surrogate of PPO and its two extensions."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_megatron.objectives.log_probs import importance_ratio


def clipped_policy_loss(
    log_probs_N: Tensor,
    old_log_probs_N: Tensor,
    advantages_N: Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token loss ``[N]`` and where it is clipped, bool ``[N]``; a clipped token has no gradient.

    With ``r = p / p_old``: ``max(-r A, -clip(r, 1 - eps_clip, 1 + eps_clip_high) A)`` (PPO, arXiv 1707.06347);
    ``eps_clip_high`` (default ``eps_clip``) widens the upper side (clip-higher of DAPO, arXiv 2503.14476); with
    ``eps_clip_c`` the loss of a negative advantage is at most ``-eps_clip_c * A``, however large r is (dual clip,
    arXiv 1912.09729). Minimising it raises the probability of tokens with A > 0. The gradient flows through
    ``log_probs_N`` only.
    """
    advantages_N = advantages_N.detach()
    ratio_N = importance_ratio(log_probs_N, old_log_probs_N)
    upper = eps_clip if eps_clip_high is None else eps_clip_high
    loss_N = -ratio_N * advantages_N
    bound_N = -ratio_N.detach().clamp(1.0 - eps_clip, 1.0 + upper) * advantages_N
    clipped_N = bound_N > loss_N
    loss_N = torch.where(clipped_N, bound_N, loss_N)
    if eps_clip_c is not None:
        ceiling_N = -eps_clip_c * advantages_N
        exceeds_N = (advantages_N < 0) & (loss_N > ceiling_N)
        loss_N = torch.where(exceeds_N, ceiling_N, loss_N)
        clipped_N = clipped_N | exceeds_N
    return loss_N, clipped_N
