"""What the student is compared with where it is not one teacher: several, or one extrapolated away from a reference.

A target is a distribution ``q`` for each prefix. The sampled form of the term needs the log-probability of one token,
and that only up to a number that does not depend on the token: ``E_S[c(s) grad log S] = 0``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.log_probs import floor_log_probs, log_ratio
from opd_megatron.objectives.tensors import TokenArray, as_float64, joined


def extrapolated(teacher_log_probs: TokenArray, ref_log_probs: TokenArray, scale: float) -> Tensor:
    """``log p_T + (scale - 1) (log p_T - log p_ref)`` of each token, ``[T]`` float64, both floored.

    In the place of ``log p_T`` it makes ``-d`` of the sampled term ``(scale - 1) (log p_T - log p_ref) - d`` (G-OPD,
    arXiv 2602.12125). It is ``scale log p_T + (1 - scale) log p_ref``, the log-probability of
    ``q ~ p_T^scale p_ref^(1 - scale)`` without its normaliser, which is a function of the prefix. So at discount 0 the
    expected gradient is that of the per-token KL(S||q); at discount 1 it is that of
    ``KL(S||ref) - scale E_S[log p_T / p_ref]`` over whole responses, where the normalisers of the tokens that follow
    would be missed if they were subtracted. Scale 1 is the teacher, 0 the reference.
    """
    teacher_T, ref_T = as_float64(teacher_log_probs), as_float64(ref_log_probs)
    return floor_log_probs(teacher_T) + (scale - 1.0) * log_ratio(teacher_T, ref_T)


def implicit_reward_statistics(
    teacher_log_probs: Sequence[TokenArray],
    target_log_probs: Sequence[TokenArray],
    scored: Sequence[TokenArray],
    *,
    scale: float,
) -> dict[str, float]:
    """``opd/implicit_reward``: mean of ``log p_T - log p_ref`` in nats over the ``scored`` tokens of all samples.

    ``target_log_probs`` are those of :func:`extrapolated` with ``scale`` other than 1. NaN over no tokens.
    """
    scored_N = joined(scored).bool()
    teacher_N = floor_log_probs(joined(teacher_log_probs).double()[scored_N])
    reward_N = (joined(target_log_probs).double()[scored_N] - teacher_N) / (scale - 1.0)
    return {"opd/implicit_reward": float(reward_N.mean()) if len(reward_N) else math.nan}


Mix: TypeAlias = Callable[[Sequence[TokenArray], Sequence[float]], Tensor]
"""Log-probabilities ``[T]`` of a mixture from those of its models and their weights, which sum to 1."""

TARGETS: Catalogue[Mix] = Catalogue("Targets of the distillation term", "--opd-teacher-mixture")


def arithmetic_mixture(log_probs: Sequence[TokenArray], weights: Sequence[float]) -> Tensor:
    """``log sum_i w_i p_i`` of each token, ``[T]`` float64: what a reader says who does not know which model speaks.

    A distribution at every prefix, so that with discount 1 the term is the KL to the model that mixes token by token.
    """
    logs_MT = torch.stack([as_float64(log_probs_T) for log_probs_T in log_probs])
    return torch.logsumexp(logs_MT + torch.tensor(weights, dtype=torch.float64).log()[:, None], dim=0)


def geometric_mixture(log_probs: Sequence[TokenArray], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i log p_i`` of each token, ``[T]`` float64, floored: where all models agree that a token is likely.

    The log-probability of ``q ~ prod_i p_i^(w_i)`` without its normaliser, a function of the prefix: at discount 0 the
    expected gradient is that of the per-token KL(S||q), at discount 1 that of the KL to the mixture of whole responses,
    whose one normaliser belongs to the prompt. The mean of ``log p_S`` minus it is no KL but exceeds one by minus the
    log of the normaliser.
    """
    logs_MT = torch.stack([floor_log_probs(as_float64(log_probs_T)) for log_probs_T in log_probs])
    return torch.tensor(weights, dtype=torch.float64) @ logs_MT


TARGETS.register(
    "arithmetic",
    arithmetic_mixture,
    title="several teachers, arithmetic",
    formula=r"$T = \sum_i w_i T_i$",
    source="Linear opinion pool, Stone 1961",
    proof="test_targets.py::test_mixtures_have_the_gradient_of_the_kl_to_them",
    more_flags="[--opd-teacher-weights W ...]",
)
TARGETS.register(
    "geometric",
    geometric_mixture,
    title="several teachers, geometric",
    formula=r"$T \propto \prod_i T_i^{w_i}$",
    source="Products of experts, Hinton 2002",
    proof="test_targets.py::test_mixtures_have_the_gradient_of_the_kl_to_them",
    more_flags="[--opd-teacher-weights W ...]",
)
TARGETS.describe(
    "reward extrapolation, sampled",
    "--opd-reward-scale L [--opd-ref-load DIR]",
    formula=r"$A \leftarrow A + c\thinspace [(\lambda - 1)(\log T - \log R) - d_t]$",
    source="G-OPD, arXiv 2602.12125",
    proof="test_targets.py::test_extrapolation_maximises_the_scaled_reward",
)
TARGETS.describe(
    "reward extrapolation, whole distributions",
    "--opd-loss distribution --opd-reward-scale L [--opd-ref-load DIR]",
    formula=r"$c\thinspace D(S, q),\ q \propto T^{\lambda} R^{1-\lambda}$",
    source="G-OPD, arXiv 2602.12125",
    proof="test_targets.py::test_both_forms_of_extrapolation_have_one_expected_gradient",
)
