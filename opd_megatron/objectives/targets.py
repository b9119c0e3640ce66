"""What the student is compared with where it is not one teacher: a teacher extrapolated away from a reference.

A target is a distribution ``q`` for each prefix. The sampled form of the term needs the log-probability of one token,
and that only up to a number that does not depend on the token: ``E_S[c(s) grad log S] = 0``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


TARGETS: Catalogue[None] = Catalogue("Targets of the distillation term", "")
TARGETS.describe(
    "reward extrapolation, sampled",
    "--opd-reward-scale L",
    formula=r"$A \leftarrow A + c\,[(\lambda - 1)(\log T - \log R) - d_t]$",
    source="G-OPD, arXiv 2602.12125",
    proof="test_targets.py::test_extrapolation_maximises_the_scaled_reward",
)
TARGETS.describe(
    "reward extrapolation, whole distributions",
    "--opd-loss distribution --opd-reward-scale L",
    formula=r"$c\, D(S, q),\ q \propto T^{\lambda} R^{1-\lambda}$",
    source="G-OPD, arXiv 2602.12125",
    proof="test_targets.py::test_both_forms_of_extrapolation_have_one_expected_gradient",
)
