"""Divergences between the student's and the teacher's distribution, one class at a time.

With ``a = log S(v)`` and ``b = log T(v)`` of a class ``v`` (a token, or the tail of a top-k record) a divergence is a
sum of terms ``f(a, b)`` over all classes. Its gradient with respect to logits ``z`` of S is

    dD/dz_v = s_v - S(v) * sum_u s_u,        s = df/da.

Adding a multiple of ``S(v)`` to ``s`` leaves it as it is, because probabilities sum to 1; so a divergence may give any
such ``s``, and the ones here leave out the constants. A distribution that sums to less than 1 has no such freedom: the
classes must cover the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from opd_megatron.objectives.log_probs import floor_log_probs

Divergence: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(log_student, log_teacher) -> (terms, slopes)``, all of one shape: the terms ``f`` and the slopes ``s`` above.

Both are finite for every log-probability from ``-inf`` to 0. Logarithms below
:data:`~opd_megatron.objectives.log_probs.LOG_PROB_FLOOR` count as that floor; probabilities stay what they are.
"""


def reverse_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(S||T): ``f = S (a - b)``, ``s = S (a - b)``."""
    terms = torch.exp(log_student) * (floor_log_probs(log_student) - floor_log_probs(log_teacher))
    return terms, terms


def forward_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(T||S): ``f = T (b - a)``, ``s = -T``."""
    teacher = torch.exp(log_teacher)
    return teacher * (floor_log_probs(log_teacher) - floor_log_probs(log_student)), -teacher


def jensen_shannon(beta: float) -> Divergence:
    """Generalised Jensen-Shannon divergence of weight ``beta`` in [0, 1] (arXiv 2306.13649, equation 1).

    With ``m = beta T + (1 - beta) S`` it is ``beta KL(T||m) + (1 - beta) KL(S||m)``:
    ``f = beta T (b - log m) + (1 - beta) S (a - log m)`` and ``s = (1 - beta) S (a - log m)``. Its value and its
    gradient vanish towards both ends, so 0 and 1 are definitions of their own: beta 0 is the forward KL(T||S) and
    beta 1 the reverse KL(S||T). Raises ``ValueError`` if ``beta`` is outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta {beta} of the Jensen-Shannon divergence is not between 0 and 1")
    if beta == 0.0:
        return forward_kl
    if beta == 1.0:
        return reverse_kl

    def divergence(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        log_student_share = floor_log_probs(log_student) + math.log1p(-beta)
        log_teacher_share = floor_log_probs(log_teacher) + math.log(beta)
        log_mixture = torch.logaddexp(log_student_share, log_teacher_share)
        slopes = torch.exp(log_student) * (log_student_share - math.log1p(-beta) - log_mixture) * (1 - beta)
        teacher_terms = torch.exp(log_teacher) * (log_teacher_share - math.log(beta) - log_mixture) * beta
        return teacher_terms + slopes, slopes

    return divergence
