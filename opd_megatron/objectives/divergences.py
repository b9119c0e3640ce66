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
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from opd_megatron.objectives.log_probs import floor_log_probs

Divergence: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(log_student, log_teacher) -> (terms, slopes)``, all of one shape: the terms ``f`` and the slopes ``s`` above.

Both are finite for every log-probability from ``-inf`` to 0. Logarithms below
:data:`~opd_megatron.objectives.log_probs.LOG_PROB_FLOOR` count as that floor; probabilities stay what they are.
"""

_LARGEST_EXPONENT = 60.0
"""Above it ``log(1 + share (exp(x) - 1))`` is ``log(share) + x`` to rounding; float32 overflows at 88."""


def reverse_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(S||T): ``f = S (a - b)``, ``s = S (a - b)``."""
    terms = torch.exp(log_student) * (floor_log_probs(log_student) - floor_log_probs(log_teacher))
    return terms, terms


def forward_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(T||S): ``f = T (b - a)``, ``s = -T``."""
    teacher = torch.exp(log_teacher)
    return teacher * (floor_log_probs(log_teacher) - floor_log_probs(log_student)), -teacher


def jensen_shannon(beta: float, *, scaled: bool = False) -> Divergence:
    """Generalised Jensen-Shannon divergence of weight ``beta`` in [0, 1] (arXiv 2306.13649, equation 1).

    With ``m = beta T + (1 - beta) S`` it is ``beta KL(T||m) + (1 - beta) KL(S||m)``:
    ``f = beta T (b - log m) + (1 - beta) S (a - log m)`` and ``s = (1 - beta) S (a - log m)``. Its value and its
    gradient vanish towards both ends, so 0 and 1 are definitions of their own: beta 0 is the forward KL(T||S) and
    beta 1 the reverse KL(S||T). ``scaled`` divides by ``beta (1 - beta)``, which is continuous to both ends, as a
    schedule over beta needs. Raises ``ValueError`` if ``beta`` is outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta {beta} of the Jensen-Shannon divergence is not between 0 and 1")
    if beta == 0.0:
        return forward_kl
    if beta == 1.0:
        return reverse_kl
    teacher_weight, student_weight = (1 / (1 - beta), 1 / beta) if scaled else (beta, 1 - beta)

    def divergence(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        slopes = torch.exp(log_student) * _log_over_mixture(log_student, log_teacher, beta) * student_weight
        teacher_terms = torch.exp(log_teacher) * _log_over_mixture(log_teacher, log_student, 1 - beta) * teacher_weight
        return teacher_terms + slopes, slopes

    return divergence


def skew_kl(share: float) -> Divergence:
    """Skew forward KL, ``KL(T || m)`` with ``m = share T + (1 - share) S`` (DistiLLM, arXiv 2402.03898).

    ``f = T (b - log m)``, ``s = -(1 - share) T S / m``; ``share`` in [0, 1), 0 is the forward KL. The slope is bounded
    where the student's probability vanishes, unlike that of the forward KL. Raises ``ValueError`` on another ``share``.
    """
    if _checked_share(share) == 0.0:
        return forward_kl

    def divergence(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        log_over = _log_over_mixture(log_teacher, log_student, 1 - share)
        teacher = torch.exp(log_teacher)
        return teacher * log_over, -(1 - share) * torch.exp(log_student) * torch.exp(log_over)

    return divergence


def skew_reverse_kl(share: float) -> Divergence:
    """Skew reverse KL, ``KL(S || m)`` with ``m = (1 - share) T + share S`` (DistiLLM, arXiv 2402.03898).

    ``f = S (a - log m)``, ``s = S (a - log m) - share S^2 / m``; ``share`` in [0, 1), 0 is the reverse KL. At most
    ``-log share``, however little the teacher thinks of a token. Raises ``ValueError`` on another ``share``.
    """
    if _checked_share(share) == 0.0:
        return reverse_kl

    def divergence(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = torch.exp(log_student)
        log_over = _log_over_mixture(log_student, log_teacher, 1 - share)
        terms = student * log_over
        return terms, terms - share * student * torch.exp(log_over)

    return divergence


def alpha_divergence(alpha: float) -> Divergence:
    """Alpha divergence ``(sum T^alpha S^(1-alpha) - 1) / (alpha (alpha - 1))``, ``alpha`` in [0, 1] (Amari).

    ``f = (T^alpha S^(1-alpha) - alpha T - (1 - alpha) S) / (alpha (alpha - 1))``, which is never negative, and
    ``s = -(T^alpha S^(1-alpha) - S) / alpha``. Its limits are definitions of their own: 1 is the forward KL(T||S), 0
    the reverse KL(S||T); 1/2 is four times the squared Hellinger distance. Raises ``ValueError`` on another ``alpha``.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha {alpha} of the alpha divergence is not between 0 and 1")
    if alpha == 0.0:
        return reverse_kl
    if alpha == 1.0:
        return forward_kl

    def divergence(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        log_student_floored, log_teacher_floored = floor_log_probs(log_student), floor_log_probs(log_teacher)
        student, teacher = torch.exp(log_student), torch.exp(log_teacher)
        exponent = alpha * (log_teacher_floored - log_student_floored)
        # two forms of T^alpha S^(1-alpha) - S, of which each is exact where the other cancels or overflows
        excess = torch.where(
            exponent.abs() < 1.0,
            student * torch.expm1(exponent.clamp(max=1.0)),
            torch.exp(log_student_floored + exponent) - student,
        )
        return (excess - alpha * (teacher - student)) / (alpha * (alpha - 1)), -excess / alpha

    return divergence


def weighted_sum(parts: Sequence[tuple[float, Divergence]]) -> Divergence:
    """``sum_i w_i D_i`` over pairs ``(w_i, D_i)``; raises ``ValueError`` unless the weights are >= 0, one above."""
    parts = [(weight, divergence) for weight, divergence in parts if weight != 0.0]
    if not parts or any(weight < 0 for weight, _ in parts):
        raise ValueError("a sum of divergences needs weights of which none is negative and one positive")
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]

    def divergence(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        terms, slopes = torch.zeros_like(log_student), torch.zeros_like(log_student)
        for weight, part in parts:
            part_terms, part_slopes = part(log_student, log_teacher)
            terms.add_(part_terms, alpha=weight)
            slopes.add_(part_slopes, alpha=weight)
        return terms, slopes

    return divergence


def entropy_aware(
    divergence_N: Tensor, forward_kl_N: Tensor, teacher_entropy_N: Tensor, *, vocab_size: int, weight: float
) -> Tensor:
    """``D + w H(T)/ln V KL(T||S)`` at each position, ``[N]`` in nats (cf. arXiv 2603.07079).

    The reverse KL that ``D`` usually is lets the student drop what a teacher that is not sure thinks possible; the
    forward KL, the more of it the less sure the teacher is, keeps it. ``divergence_N`` and ``forward_kl_N`` carry the
    gradient; ``teacher_entropy_N``, in nats and at the same temperature, is a constant. ``vocab_size`` is ``V``, so
    that the share ``H(T)/ln V`` is 1 for a uniform teacher. Never negative, and 0 at ``S = T`` alone. Raises
    ``ValueError`` on a negative ``weight`` and on fewer than two tokens.
    """
    if weight < 0 or vocab_size < 2:
        raise ValueError(f"entropy-aware distillation of weight {weight} over {vocab_size} tokens")
    return divergence_N + weight / math.log(vocab_size) * teacher_entropy_N.detach() * forward_kl_N


def _checked_share(share: float) -> float:
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share {share} of the own distribution in a skew divergence is not in [0, 1)")
    return share


def _log_over_mixture(log_own: Tensor, log_other: Tensor, share: float) -> Tensor:
    """``log p - log((1 - share) p + share q)`` of ``p = exp(log_own)``, ``q = exp(log_other)``, floored; 0 < share < 1.

    ``-log(1 + share (q/p - 1))``: exact to rounding also where the mixture is nearly p, as for shares close to 0.
    """
    difference = floor_log_probs(log_other) - floor_log_probs(log_own)
    inside = difference.clamp(max=_LARGEST_EXPONENT)
    return -torch.log1p(share * torch.expm1(inside)) - (difference - inside)
