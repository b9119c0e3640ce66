"""Sampled estimates of KL(S||ref) and losses that have its gradient.

With ``x = log S(a) - log ref(a)`` and ``a ~ S``: k1 = x, k2 = x^2/2, k3 = exp(-x) + x - 1 (J. Schulman, "Approximating
KL divergence", 2020). As values k1 and k3 are unbiased. As losses they are not interchangeable with it: backpropagated
as they stand, k1 has expected gradient 0 and k3 that of KL(ref||S). :func:`kl_loss` gives the forms that are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from opd_megatron.objectives.catalogue import Catalogue
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


KlLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(x, r) -> loss`` from the differentiable ``x = log S - log ref`` and ``r = S / S_old``; all ``[N]``."""


def _times_ratio(kind: str) -> KlLoss:
    return lambda distance_N, ratio_N: ratio_N * kl_estimate(kind, distance_N)


def _times_fixed_ratio(kind: str) -> KlLoss:
    return lambda distance_N, ratio_N: ratio_N.detach() * kl_estimate(kind, distance_N)


def _straight_through(kind: str) -> KlLoss:
    def loss(distance_N: Tensor, ratio_N: Tensor) -> Tensor:
        gradient_N = kl_estimate("k2", distance_N)
        return ratio_N.detach() * (kl_estimate(kind, distance_N.detach()) + gradient_N - gradient_N.detach())

    return loss


KL_LOSSES: Catalogue[KlLoss] = Catalogue("KL to a reference as a loss", "--use-kl-loss --kl-loss-type")
_IS_THE_KLS = "test_exact_gradients.py::test_kl_loss_has_the_gradient_of_the_reverse_kl"
_SHOWS_THE_KL = "test_exact_gradients.py::test_straight_through_forms_show_the_kl"
for _kind, _loss, _formula, _proof in (
    ("k1", _times_ratio("k1"), r"$\rho\thinspace x$", _IS_THE_KLS),
    ("k2", _times_fixed_ratio("k2"), r"$\mathrm{sg}(\rho)\thinspace x^2 / 2$", _IS_THE_KLS),
    ("k3", _times_ratio("k3"), r"$\rho\thinspace (e^{-x} + x - 1)$", _IS_THE_KLS),
    ("k1+", _straight_through("k1"), r"value $\rho\thinspace x$, gradient of k2", _SHOWS_THE_KL),
    ("k3+", _straight_through("k3"), r"value $\rho\thinspace (e^{-x} + x - 1)$, gradient of k2", _SHOWS_THE_KL),
):
    KL_LOSSES.register(
        _kind,
        _loss,
        title=_kind,
        formula=_formula,
        source="Schulman, *Approximating KL divergence*, 2020",
        proof=_proof,
    )


def kl_loss(kind: str, log_probs_N: Tensor, ref_log_probs_N: Tensor, old_log_probs_N: Tensor) -> Tensor:
    """Loss ``[N]`` whose expected gradient over tokens from the old policy is that of KL(S||ref).

    With the importance ratio ``r = S / S_old`` and sg() for "detached": ``r * k1``, ``sg(r) * k2``, ``r * k3``. The
    gradient of k2 is ``x * grad log S`` already, so only the sampling has to be corrected; k1 and k3 need the gradient
    of the sampling law as well. ``k1+`` and ``k3+`` are straight-through: the value of ``sg(r) * k1`` or
    ``sg(r) * k3``, whose mean is the KL, with the gradient of ``sg(r) * k2``. Where the rollout is on-policy pass
    ``log_probs_N.detach()`` as the old ones; r is then 1 and still differentiable. Reference log-probabilities are
    floored (:func:`~opd_megatron.objectives.log_probs.floor_log_probs`). Raises ``KeyError`` on an unknown ``kind``.
    """
    distance_N = log_probs_N - floor_log_probs(ref_log_probs_N)
    return KL_LOSSES[kind](distance_N, importance_ratio(log_probs_N, old_log_probs_N))
