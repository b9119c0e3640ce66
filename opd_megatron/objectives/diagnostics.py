"""What the tokens of a rollout say about the distillation: pure functions of per-token numbers.

Shape legend: ``T`` tokens of a response, ``U`` scored tokens of the rollout: loss mask 1 and a valid teacher score.
``k1 = log p_S - log p_T`` of the sampled token. All arithmetic is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_megatron.objectives.log_probs import LOG_RATIO_LIMIT, log_ratio
from opd_megatron.objectives.sampling import clustered_error, effective_share
from opd_megatron.objectives.tensors import TokenArray, joined, owners

OF_STUDENT = ("student_log_prob", "student_entropy")
"""Always measured: log p_S of the sampled token, and H(S) in nats."""

OF_CHOICE = ("divergence",)
"""Where tokens are chosen by it: the Jensen-Shannon divergence from the teacher in nats, over the term's own support.

0 where the teacher gave no score.
"""

OF_TEACHER = ("reverse_kl", "forward_kl", "jsd", "teacher_entropy", "teacher_mass", "student_mass", "overlap")
"""Where the whole distribution of the teacher is at hand.

KL(S||T), KL(T||S) and the Jensen-Shannon divergence of weight 1/2 in nats; H(T); the teacher's mass on the student's K
likeliest tokens, the student's on the teacher's, and the share of tokens that the two sets have in common.
"""

OF_RECORD = ("student_mass", "overlap")
"""Where the teacher's K likeliest tokens are known."""

MEANS = {
    "reverse_kl": "opd/reverse_kl_exact",
    "forward_kl": "opd/forward_kl_exact",
    "jsd": "opd/jsd_exact",
    "student_entropy": "opd/student_entropy",
    "teacher_entropy": "opd/teacher_entropy",
    "teacher_mass": "opd/teacher_mass_on_student_topk",
    "student_mass": "opd/student_mass_on_teacher_topk",
    "overlap": "opd/topk_overlap",
}
"""Metrics that are means over the scored tokens."""

QUARTERS = 4
MOST_TEACHERS = 8
"""Teachers that have metrics of their own; those with fewer tokens count together as ``other``."""


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of a rollout, ``[U]`` each; ``sample_U`` numbers the samples from 0."""

    sample_U: Tensor
    quarter_U: Tensor
    k1_U: Tensor
    columns: Mapping[str, Tensor]

    @property
    def distance_U(self) -> Tensor:
        """KL(S||T) at the position where it is known, else its one-sample estimate k1."""
        return self.columns.get("reverse_kl", self.k1_U)

    def mean(self, values_U: Tensor, chosen_U: Tensor) -> float:
        """Over the chosen tokens; NaN where there is none."""
        return values_U[chosen_U].mean().item() if bool(chosen_U.any()) else math.nan


def scored_tokens(
    measured: Sequence[Mapping[str, TokenArray]],
    teacher_log_probs: Sequence[TokenArray],
    loss_masks: Sequence[TokenArray],
    teacher_valid: Sequence[TokenArray],
) -> ScoredTokens:
    """Join the samples, one ``[T]`` for each argument and field of ``measured``, and keep the scored tokens.

    Of the fields the student's log-probability and those of :data:`MEANS` are looked at.

    Raises ``ValueError`` when the samples of the arguments differ in number, or the tokens of all of them together.
    """
    lengths = [len(mask) for mask in loss_masks]
    if not len(measured) == len(teacher_log_probs) == len(teacher_valid) == len(lengths):
        raise ValueError(f"{len(measured)} samples were measured, {len(lengths)} are there")
    scored_N = joined(loss_masks).bool() & joined(teacher_valid).bool()

    def column(name: str) -> Tensor:
        return joined([sample[name] for sample in measured]).double()[scored_N]

    columns = {name: column(name) for name in MEANS if measured and name in measured[0]}
    quarter_N = joined([position_quarters(length) for length in lengths]).long()
    k1_U = log_ratio(column("student_log_prob"), joined(teacher_log_probs).double()[scored_N])
    return ScoredTokens(owners(lengths)[scored_N], quarter_N[scored_N], k1_U, columns)


def distillation_statistics(tokens: ScoredTokens) -> dict[str, float]:
    """Means, parts and weights of the rollout's distance from the teacher.

    - every metric of :data:`MEANS` that was measured;
    - ``opd/kl_by_position_q1`` .. ``_q4``: mean distance in the quarters of each response;
    - ``opd/kl_by_entropy_q1`` .. ``_q4``: the same where the student's entropy is among the rollout's lowest to highest
      quarter. The distance is the exact KL where it was measured, else k1, whose parts by entropy are estimates of the
      same: the entropy is known before the token is drawn;
    - ``opd/effective_sample_frac``: :func:`~opd_megatron.objectives.sampling.effective_share` of the weights
      ``p_T / p_S``, their exponents limited to 20: how much the student's samples tell about the teacher.
    """
    everywhere_U = torch.ones_like(tokens.k1_U, dtype=torch.bool)
    found = {MEANS[name]: tokens.mean(values_U, everywhere_U) for name, values_U in tokens.columns.items()}
    parts = {"position": tokens.quarter_U, "entropy": rank_quarters(tokens.columns["student_entropy"])}
    for what, part_U in parts.items():
        for quarter in range(QUARTERS):
            found[f"opd/kl_by_{what}_q{quarter + 1}"] = tokens.mean(tokens.distance_U, part_U == quarter)
    weights_U = (-tokens.k1_U).clamp(max=LOG_RATIO_LIMIT).exp()
    return found | {"opd/effective_sample_frac": effective_share(weights_U)}


def outcome_statistics(tokens: ScoredTokens, passed: Sequence[bool]) -> dict[str, float]:
    """``opd/reverse_kl_correct`` and ``opd/reverse_kl_incorrect``: k1 of the samples that ``passed`` and of the others.

    With standard errors ``_se``, samples being clusters. A larger value among correct samples says that the teacher
    thinks less of right answers than of wrong ones, so the term works against the task: so shows a teacher that is
    worse than its student on what the student gets right. What it would answer itself is not asked. NaN without samples
    of a kind.
    """
    passed_U = torch.tensor(list(passed), dtype=torch.bool)[tokens.sample_U]
    found: dict[str, float] = {}
    for outcome, chosen_U in (("correct", passed_U), ("incorrect", ~passed_U)):
        mean, error = clustered_mean(tokens.k1_U[chosen_U], tokens.sample_U[chosen_U])
        found |= {f"opd/reverse_kl_{outcome}": mean, f"opd/reverse_kl_{outcome}_se": error}
    return found


def teacher_statistics(tokens: ScoredTokens, teachers: Sequence[str]) -> dict[str, float]:
    """``opd/teacher/<name>/reverse_kl`` and ``tokens_frac`` where several teachers share a rollout; else nothing.

    ``teachers`` name that of each sample. At most :data:`MOST_TEACHERS` names occur: of more, those with fewest tokens
    are ``other``.
    """
    counts: dict[str, int] = {}
    of_B = torch.bincount(tokens.sample_U, minlength=len(teachers)).tolist()
    for name, count in zip(teachers, of_B, strict=True):
        if count:
            counts[name] = counts.get(name, 0) + count
    if len(counts) < 2:
        return {}
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    kept = ranked if len(ranked) <= MOST_TEACHERS else ranked[: MOST_TEACHERS - 1]
    labels = [name if name in kept else "other" for name in teachers]
    found = {}
    for label in dict.fromkeys([*kept, *("other" for name in ranked if name not in kept)]):
        of_U = torch.tensor([each == label for each in labels])[tokens.sample_U]
        found[f"opd/teacher/{label}/reverse_kl"] = tokens.mean(tokens.k1_U, of_U)
        found[f"opd/teacher/{label}/tokens_frac"] = of_U.double().mean().item()
    return found


def clustered_mean(values_U: Tensor, cluster_U: Tensor) -> tuple[float, float]:
    """Mean and its standard error with clusters, see :func:`~opd_megatron.objectives.sampling.clustered_error`.

    NaN where there is no value; the error also with one cluster.
    """
    if not len(values_U):
        return math.nan, math.nan
    _, place_U = cluster_U.unique(return_inverse=True)
    clusters, ones_U = int(place_U.max()) + 1, torch.ones_like(values_U)
    sums_M, counts_M = (values_U.new_zeros(clusters).index_add_(0, place_U, part) for part in (values_U, ones_U))
    mean = values_U.mean()
    return mean.item(), clustered_error(sums_M, counts_M, mean)


def position_quarters(length: int) -> Tensor:
    """``[length]`` int64: the quarter of a response that each of its tokens is in, ``floor(4 t / T)``."""
    return torch.arange(length) * QUARTERS // max(1, length)


def rank_quarters(values_U: Tensor) -> Tensor:
    """``[U]`` int64: 0 for the lowest quarter of the values to 3 for the highest; equal ones go by their order."""
    ranks_U = torch.empty(len(values_U), dtype=torch.int64)
    ranks_U[values_U.argsort(stable=True)] = torch.arange(len(values_U))
    return ranks_U * QUARTERS // max(1, len(values_U))


def repetition(responses: Sequence[NDArray[np.integer[Any]]], size: int = 4) -> float:
    """Mean over the responses ``[T]`` of the share of their ``size``-grams that occurred before in the same response.

    0 where all differ; near 1 in a loop. Responses of fewer than ``size + 1`` tokens do not count; NaN without others.
    """
    shares = []
    for response_T in responses:
        count = len(response_T) - size + 1
        if count > 1:
            shares.append(1.0 - _distinct_grams(response_T.astype(np.int64), size) / count)
    return sum(shares) / len(shares) if shares else math.nan


def _distinct_grams(tokens_T: NDArray[np.int64], size: int) -> int:
    """How many ``size``-grams differ; each is packed into one integer, of the places in a sorted list where needed."""
    radix = kinds = int(tokens_T.max()) + 1
    grams = tokens_T
    for start in range(1, size):
        if kinds > np.iinfo(np.int64).max // radix:
            found, grams = np.unique(grams, return_inverse=True)
            kinds = len(found)
        grams, kinds = grams[:-1] * radix + tokens_T[start:], kinds * radix
    return len(np.unique(grams))
