"""On-policy distillation: one additive per-token term on top of any advantage.

The student samples a response, the teacher scores its tokens, and ``d_t = log p_S(a_t) - log p_T(a_t)`` is subtracted
from the advantage: ``A_t <- A_t - coef * d_t``. With tokens from the student the policy gradient with advantage
``-d_t`` is, in expectation, the gradient of the per-token reverse KL(S||T) with the distribution of the prefixes held
fixed. (The gradient of the KL between whole responses would also credit a token with the ``d`` of those that follow.)

Both log-probabilities are taken at the temperature of the rollout. The student's is the trainer's under the weights
that sampled the rollout, never the rollout engine's; it stays fixed over the optimizer steps of the rollout, which
after the first descend KL(S||T) - KL(S||S_old), so many steps on one rollout do not end at the teacher. The term is
added after every normalisation of the task advantage and is never whitened, so that ``coef`` keeps its meaning:
whitened together with a constant task advantage it would cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_megatron.objectives.kl import kl_estimate
from opd_megatron.objectives.log_probs import LOG_PROB_FLOOR, floor_log_probs, importance_ratio, log_ratio
from opd_megatron.objectives.returns import discounted_returns
from opd_megatron.objectives.sampling import clustered_error
from opd_megatron.objectives.tensors import TokenArray, as_float64, as_mask, joined, owners


def sampled_term(
    student_log_probs_N: Tensor,
    teacher_log_probs_N: Tensor,
    valid_N: Tensor,
    *,
    baseline_N: Tensor | None = None,
    limit: float | None = None,
    future_N: Tensor | None = None,
) -> Tensor:
    """What the teacher adds to the advantage, ``-(d - b + F)`` with ``d = log p_S - log p_T``; ``[N]``, detached.

    ``-F`` where not ``valid_N``. ``baseline_N`` is ``b`` (None: 0), a function of the prefix alone. Since
    ``E_S[grad log p_S] = 0``, it leaves the expected gradient as it is; with ``b = KL(S||T)`` at the position, which is
    the mean of ``log p_S - log p_T`` under the student, the gradient is usually less noisy (cf. arXiv 2605.07865):
    usually, because the baseline of least variance weighs each action by its squared score.

    ``valid_N`` is bool: the teacher scored the token and the loss mask is 1. Elsewhere the log-probabilities may be
    anything, NaN included. ``limit`` clips ``d`` to ``[-limit, limit]`` first (:func:`clip_distance`). ``future_N`` is
    ``F`` (None: 0), what :func:`future_distances` makes of the tokens that follow. A valid log-probability of ``-inf``
    (the teacher rules the token out) counts as :data:`~opd_megatron.objectives.log_probs.LOG_PROB_FLOOR` and is counted
    by ``opd/floored_frac``.
    """
    distance_N = clip_distance(log_ratio(student_log_probs_N, teacher_log_probs_N), limit)
    if baseline_N is not None:
        distance_N = distance_N - baseline_N.detach()
    term_N = torch.where(valid_N, distance_N, 0.0)
    return -term_N if future_N is None else -(term_N + future_N.detach())


def clip_distance(distance: Tensor, limit: float | None) -> Tensor:
    """``d`` clipped to ``[-limit, limit]`` (None: as it is); any shape.

    It bounds what one token can do to a step, and biases the term: the mean of the clipped ``d`` over the student is no
    divergence. The share of tokens that it changes is the metric ``train/opd_clipfrac``.
    """
    return distance if limit is None else distance.clamp(-limit, limit)


def future_distances(
    student_log_probs: Sequence[TokenArray],
    teacher_log_probs: Sequence[TokenArray],
    loss_masks: Sequence[TokenArray],
    teacher_valid: Sequence[TokenArray],
    *,
    discount: float,
    limit: float | None = None,
) -> list[Tensor]:
    """``F_t = sum_{u > t} discount^(u - t) d_u``, one float64 ``[T]`` per sample, 0 where the loss mask is 0.

    Time passes at unmasked tokens only; one that the teacher did not score has ``d = 0``. ``d + F`` in place of ``d``
    makes the expected gradient that of the KL between whole responses at discount 1, and at discount 0 that of the
    per-token KL with fixed prefixes; in between of neither. ``limit`` clips each ``d_u``. A baseline belongs to a
    token's own ``d`` alone: the mean of a later ``d_u``, given the token, is just what the future is about. Raises
    ``ValueError`` unless ``0 <= discount <= 1`` and the lengths agree.
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount {discount} of the distillation term is not between 0 and 1")
    futures = []
    arguments = zip(student_log_probs, teacher_log_probs, loss_masks, teacher_valid, strict=True)
    for student, teacher, loss_mask, valid in arguments:
        mask_T = as_mask(loss_mask)
        distance_T = clip_distance(log_ratio(as_float64(student), as_float64(teacher)), limit)
        distance_U = torch.where(as_mask(valid), distance_T, 0.0)[mask_T]
        future_T = torch.zeros(len(mask_T), dtype=torch.float64)
        future_T[mask_T] = discounted_returns(distance_U, discount) - distance_U
        futures.append(future_T)
    return futures


def importance_weighted_term(
    log_probs_N: Tensor,
    old_log_probs_N: Tensor,
    teacher_log_probs_N: Tensor,
    valid_N: Tensor,
    *,
    limit: float | None = None,
) -> Tensor:
    """Loss ``r * sg(d)`` with ``r = p_S / p_old`` and ``d`` of the **current** weights, ``[N]``; 0 where not valid.

    For several optimizer steps on one rollout: with tokens from the old policy its expected gradient is that of
    KL(S||T) of the current student at the prefixes of the rollout, unlike the clipped surrogate with ``d`` of the old
    weights, which descends KL(S||T) - KL(S||S_old). The ratio is not clipped, and the prefixes stay those of the old
    policy: only at the first step are they the student's own. The gradient flows through ``r`` alone.
    """
    kept_N, old_N = (torch.where(valid_N, values_N, 0.0) for values_N in (log_probs_N, old_log_probs_N))
    distance_N = clip_distance(log_ratio(kept_N, torch.where(valid_N, teacher_log_probs_N, 0.0)), limit)
    return importance_ratio(kept_N, old_N) * distance_N


def reverse_kl_statistics(
    student_log_probs: Sequence[TokenArray],
    teacher_log_probs: Sequence[TokenArray],
    loss_masks: Sequence[TokenArray],
    teacher_valid: Sequence[TokenArray] | None = None,
) -> dict[str, float]:
    """What the student's own samples say about its distance from the teacher; one ``[T]`` per sample and argument.

    Means are over scored tokens, those with loss mask 1 and a valid teacher score (all, without ``teacher_valid``):

    - ``opd/reverse_kl``: mean of k1 = log p_S - log p_T, in nats; ``opd/k3``: mean of k3, the same with less variance
      and never negative;
    - ``opd/reverse_kl_se``: standard error of ``opd/reverse_kl`` with samples as clusters, since tokens of one response
      are not independent (:func:`~opd_megatron.objectives.sampling.clustered_error`, over the samples with scored
      tokens); NaN with fewer than two;
    - ``opd/student_log_prob``, ``opd/teacher_log_prob``, their perplexities ``exp(-mean)`` and
      ``opd/perplexity_gap``, teacher's minus student's;
    - ``opd/floored_frac``: tokens where either log-probability lies below the floor (see :func:`sampled_term`);
    - ``opd/scored_frac``: scored tokens among those with loss mask 1; ``opd/tokens``: scored tokens.

    A mean over no tokens is NaN. Raises ``ValueError`` when the lists or the tokens of a sample differ in length.
    """
    if teacher_valid is None:
        teacher_valid = loss_masks
    lengths = [len(student) for student in student_log_probs]
    samples = zip(lengths, teacher_log_probs, loss_masks, teacher_valid, strict=True)
    for position, (length, teacher, loss_mask, valid) in enumerate(samples):
        if not length == len(teacher) == len(loss_mask) == len(valid):
            raise ValueError(
                f"sample {position}: {length} student and {len(teacher)} teacher log-probabilities, "
                f"{len(loss_mask)} loss mask and {len(valid)} validity entries"
            )
    mask_N = joined(loss_masks).bool()
    scored_N = mask_N & joined(teacher_valid).bool()
    columns_U6 = _columns(joined(student_log_probs).double()[scored_N], joined(teacher_log_probs).double()[scored_N])
    sums_B6 = columns_U6.new_zeros(len(lengths), 6).index_add_(0, owners(lengths)[scored_N], columns_U6)
    return _metrics(sums_B6, int(mask_N.sum()))


def _columns(student_U: Tensor, teacher_U: Tensor) -> Tensor:
    """``[U, 6]``: 1, k1, k3, both log-probabilities and whether one is floored, of each scored token."""
    k1_U = log_ratio(student_U, teacher_U)
    floored_U = (student_U < LOG_PROB_FLOOR) | (teacher_U < LOG_PROB_FLOOR)
    columns = (
        torch.ones_like(k1_U),
        k1_U,
        kl_estimate("k3", k1_U),
        floor_log_probs(student_U),
        floor_log_probs(teacher_U),
        floored_U.double(),
    )
    return torch.stack(columns, dim=1)


def _metrics(sums_B6: Tensor, trained: int) -> dict[str, float]:
    sums_B6 = sums_B6[sums_B6[:, 0] > 0]
    tokens = sums_B6[:, 0].sum()
    # 0 / 0 is NaN, which is what a mean over no tokens is.
    reverse_kl, k3, student, teacher, floored = (sums_B6[:, 1:].sum(dim=0) / tokens).unbind()
    student_perplexity, teacher_perplexity = (-student).exp().item(), (-teacher).exp().item()
    return {
        "opd/reverse_kl": reverse_kl.item(),
        "opd/reverse_kl_se": clustered_error(sums_B6[:, 1], sums_B6[:, 0], reverse_kl),
        "opd/k3": k3.item(),
        "opd/student_log_prob": student.item(),
        "opd/teacher_log_prob": teacher.item(),
        "opd/student_perplexity": student_perplexity,
        "opd/teacher_perplexity": teacher_perplexity,
        "opd/perplexity_gap": teacher_perplexity - student_perplexity,
        "opd/floored_frac": floored.item(),
        "opd/scored_frac": tokens.item() / trained if trained else math.nan,
        "opd/tokens": tokens.item(),
    }
