"""What the critic of PPO minimises, and how well it foresees.

Shape legend: ``N`` response positions of a micro-batch, all its samples concatenated; ``T`` response tokens of one
sample. A value is what the critic expects the return to be before the token is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.statistics import weighted_statistic
from opd_megatron.objectives.tensors import TokenArray, joined


def clipped_value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, value_clip: float
) -> tuple[Tensor, Tensor]:
    """Per-token loss ``[N]`` and where it is clipped, bool ``[N]``; a clipped token has no gradient.

    ``1/2 max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)`` with ``eps`` = ``value_clip``: once a value has
    moved by ``eps`` from what it was for the rollout, ``V_old``, its token no longer pulls it towards the return (the
    value clipping of PPO's first implementation, described in arXiv 2005.12729). 0: no clipping.
    """
    loss_N = (values_N - returns_N).square()
    if value_clip == 0:
        return 0.5 * loss_N, torch.zeros_like(loss_N, dtype=torch.bool)
    moved_N = values_N.detach() - old_values_N
    bound_N = (old_values_N + moved_N.clamp(-value_clip, value_clip) - returns_N).square()
    # Within the bounds both are the same but for rounding, and so is their gradient.
    clipped_N = (moved_N.abs() > value_clip) & (bound_N > loss_N)
    return 0.5 * torch.where(clipped_N, bound_N, loss_N), clipped_N


def value_objective(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    loss_weights_N: Tensor,
    loss_mask_N: Tensor,
    value_clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss of a micro-batch, a scalar, and its statistics.

    ``sum_N weights * loss`` (:func:`clipped_value_loss`); the gradient goes through ``values_N`` alone. Positions where
    the mask is 0 may hold anything.
    """
    mask_N = loss_mask_N.bool()
    kept = (torch.where(mask_N, part_N, 0.0) for part_N in (values_N, old_values_N, returns_N, loss_weights_N))
    values_N, old_N, returns_N, weights_N = kept
    loss_N, clipped_N = clipped_value_loss(values_N, old_N.detach(), returns_N.detach(), value_clip)
    metrics = {"train/value_loss": loss_N, "train/value_clipfrac": clipped_N}
    statistics = {name: weighted_statistic(metric_N, weights_N) for name, metric_N in metrics.items()}
    return (weights_N * loss_N).sum(), statistics


def value_statistics(
    values: Sequence[TokenArray], returns: Sequence[TokenArray], loss_masks: Sequence[TokenArray]
) -> dict[str, float]:
    """What the critic expected of a rollout and what came; one ``[T]`` per sample and argument.

    Over all unmasked tokens: ``train/value_mean``, ``train/return_mean`` and ``train/explained_variance``,
    ``1 - var(R - V) / var(R)``: 1 where every return was foreseen, 0 where a constant would have done as well, below 0
    where it would have done better; NaN where all returns are equal.
    """
    mask_N = joined(loss_masks).bool()
    values_N, returns_N = (joined(part).double()[mask_N] for part in (values, returns))
    explained = math.nan
    if len(returns_N) > 1 and float(returns_N.var()) > 0:
        explained = float(1 - (returns_N - values_N).var() / returns_N.var())
    return {
        "train/explained_variance": explained,
        "train/value_mean": float(values_N.mean()),
        "train/return_mean": float(returns_N.mean()),
    }


VALUE_LOSSES: Catalogue[None] = Catalogue("The critic's loss", "")
VALUE_LOSSES.describe(
    "value loss",
    "--advantage-estimator ppo --value-clip 0",
    formula=r"$\frac{1}{2} (V_t - R_t)^2$, $R_t = A_t + V_{\mathrm{old},t}$ before whitening, no distillation term",
    source="arXiv 1506.02438",
    proof="test_values.py::test_the_loss_is_half_the_squared_error",
)
VALUE_LOSSES.describe(
    "clipped value loss",
    "--advantage-estimator ppo --value-clip E",
    formula=r"$\frac{1}{2} \max((V_t - R_t)^2,"
    r" (V_{\mathrm{old},t} + \mathrm{clip}(V_t - V_{\mathrm{old},t}, -\epsilon, \epsilon) - R_t)^2)$",
    source="arXiv 2005.12729",
    proof="test_values.py::test_clipping_against_the_formula_and_autograd",
)
