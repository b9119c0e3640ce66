"""The choices of ``--opd-loss``: what the teacher's scores of a position do to its advantage or its loss.

Shape legend: ``N`` response positions of the micro-batch. Every form is without its coefficient: ``--opd-kl-coef`` and
the weights of tokens are applied by its caller (:func:`~opd_megatron.objectives.losses.policy_objective`), so they
mean the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from opd_megatron.config.options import OpdOptions
from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.kl import kl_loss
from opd_megatron.objectives.log_probs import log_ratio
from opd_megatron.objectives.opd import importance_weighted_term, sampled_term


@dataclass(frozen=True)
class OpdTerms:
    """What a form of the distillation term sees; all ``[N]``.

    ``log_probs_N`` carry the gradient; ``old_log_probs_N`` are detached, those of the weights that sampled.
    ``scored_N`` (bool) says where the loss mask is 1 and the teacher's scores are valid: other positions may hold
    anything. ``divergence_N`` carries a gradient and is there for ``distribution`` alone.
    """

    log_probs_N: Tensor
    old_log_probs_N: Tensor
    teacher_log_probs_N: Tensor
    scored_N: Tensor
    options: OpdOptions
    baseline_N: Tensor | None = None
    future_N: Tensor | None = None
    divergence_N: Tensor | None = None


@dataclass(frozen=True)
class OpdEffect:
    """What is added to the advantage (detached) or to the loss, ``[N]``, and metrics of the same shape.

    ``of_samples`` says that the loss stands for its mean over the sampled token, so that a token from another policy
    must be weighed. ``scored_metrics`` are means over the scored tokens. ``weighted_metrics`` are parts of the term:
    the weights of tokens multiply them, too.
    """

    advantage_N: Tensor | None = None
    loss_N: Tensor | None = None
    of_samples: bool = False
    scored_metrics: dict[str, Tensor] = field(default_factory=dict)
    weighted_metrics: dict[str, Tensor] = field(default_factory=dict)


OpdLoss: TypeAlias = Callable[[OpdTerms], OpdEffect]

OPD_LOSSES: Catalogue[OpdLoss] = Catalogue("Distillation terms", "--opd-loss")


def sampled(terms: OpdTerms) -> OpdEffect:
    """``-d`` of the sampled token in the advantage, with what ``--opd-kl-discount`` and ``--opd-baseline`` make of it.

    See :func:`~opd_megatron.objectives.opd.sampled_term`. With ``--opd-importance`` it is a loss of its own instead:
    :func:`~opd_megatron.objectives.opd.importance_weighted_term`.
    """
    limit = terms.options.opd_log_ratio_clip
    metrics = {}
    if limit is not None:
        student_N = terms.log_probs_N if terms.options.opd_importance else terms.old_log_probs_N
        distance_N = log_ratio(student_N, terms.teacher_log_probs_N)
        metrics["train/opd_clipfrac"] = torch.where(terms.scored_N, (distance_N.abs() > limit).float(), 0.0)
    if terms.options.opd_importance:
        loss_N = importance_weighted_term(
            terms.log_probs_N, terms.old_log_probs_N, terms.teacher_log_probs_N, terms.scored_N, limit=limit
        )
        return OpdEffect(loss_N=loss_N, of_samples=True, scored_metrics=metrics)
    advantage_N = sampled_term(
        terms.old_log_probs_N,
        terms.teacher_log_probs_N,
        terms.scored_N,
        baseline_N=terms.baseline_N,
        limit=limit,
        future_N=terms.future_N,
    )
    return OpdEffect(advantage_N=advantage_N, scored_metrics=metrics)


def distribution(terms: OpdTerms) -> OpdEffect:
    """The divergence of the whole distributions at the position, as a loss with its own gradient.

    No sampled token enters it, so it has no variance at a given prefix; the prefixes are held fixed. Raises
    ``ValueError`` without ``divergence_N``.
    """
    if terms.divergence_N is None:
        raise ValueError("--opd-loss distribution needs a divergence at each position")
    loss_N = torch.where(terms.scored_N, terms.divergence_N, 0.0)
    return OpdEffect(loss_N=loss_N, weighted_metrics={"train/opd_divergence": loss_N})


def kl_estimator(terms: OpdTerms) -> OpdEffect:
    """``--opd-kl-loss-type`` k1, k2 or k3 against the teacher as a loss, in the form whose gradient is KL(S||T)'s.

    See :func:`~opd_megatron.objectives.kl.kl_loss`: as they stand, k1 would have expected gradient 0 and k3 that of
    KL(T||S).
    """
    kept_N, old_N, teacher_N = (
        torch.where(terms.scored_N, values_N, 0.0)
        for values_N in (terms.log_probs_N, terms.old_log_probs_N, terms.teacher_log_probs_N)
    )
    return OpdEffect(loss_N=kl_loss(terms.options.opd_kl_loss_type, kept_N, teacher_N, old_N), of_samples=True)


def with_given(effect: OpdEffect, log_probs_N: Tensor, given_N: Tensor) -> OpdEffect:
    """The term with ``-log p_S`` of the tokens ``[N]`` where ``given_N`` (bool): those that the student did not sample.

    The term itself must be 0 there. The coefficient and the weights of tokens act on both alike. In expectation over
    responses of ``p`` the gradient is that of KL(p||S): of the data, or of the teacher that sampled them.
    """
    supervised_N = torch.where(given_N, -log_probs_N, 0.0)
    return replace(
        effect,
        loss_N=supervised_N if effect.loss_N is None else effect.loss_N + supervised_N,
        weighted_metrics=effect.weighted_metrics | {"train/opd_supervised_loss": supervised_N},
    )


OPD_LOSSES.register(
    "sampled",
    sampled,
    title="OPD, sampled",
    formula=r"$A \leftarrow A - c\thinspace (d_t - b_t + \sum_{u>t} \gamma^{u-t} d_u)$",
    source="arXiv 2306.13649; on-policy distillation, Thinking Machines Lab 2025",
    proof="test_exact_gradients.py::test_opd_gradient_is_that_of_the_per_token_reverse_kl",
)
OPD_LOSSES.describe(
    "OPD, discounted",
    "--opd-kl-discount G",
    formula=r"$\gamma = 1:\ \nabla\thinspace \mathrm{KL}(S \Vert T) \text{ of whole responses}$",
    source="policy gradient theorem",
    proof="test_exact_gradients.py::test_future_distances_lead_from_the_per_token_kl_to_that_of_whole_responses",
)
OPD_LOSSES.describe(
    "baseline, mean",
    "--opd-baseline kl",
    formula=r"$b = \mathbb{E}_S[d] = \mathrm{KL}(S \Vert T)$",
    source="cf. arXiv 2605.07865",
    proof="test_exact_gradients.py::test_a_baseline_leaves_the_expected_gradient",
)
OPD_LOSSES.describe(
    "baseline of least variance",
    "--opd-baseline optimal",
    formula=r"$b = \mathbb{E}_S[g^2 d] / \mathbb{E}_S[g^2]$, $g = \lvert \mathrm{onehot}_a - S \rvert$",
    source="arXiv 1301.2315",
    proof="test_exact_gradients.py::test_the_optimal_baseline_has_the_least_noise",
)
OPD_LOSSES.describe(
    "clipped log-ratio",
    "--opd-log-ratio-clip L",
    formula=r"$d_t \leftarrow \mathrm{clip}(d_t, -L, L)$ before coefficient and discount",
    source="",
    proof="test_opd_term.py::test_baseline_clip_and_future_enter_in_this_order",
)
OPD_LOSSES.describe(
    "coefficient along a line",
    "--opd-kl-coef C --opd-kl-coef-end E --opd-kl-coef-rollouts N",
    formula=r"$c = C + \min(i / N, 1)\thinspace (E - C)$ in rollout $i$",
    source="",
    proof="test_opd_losses.py::test_the_coefficient_moves_along_a_line",
)
OPD_LOSSES.describe(
    "OPD, importance-weighted",
    "--opd-importance",
    formula=r"$\frac{S}{S_{\mathrm{old}}}\thinspace \mathrm{sg}(\log S - \log T)$",
    source="score-function estimator",
    proof="test_exact_gradients.py::test_the_importance_weighted_term_has_the_gradient_of_the_current_students_kl",
)
OPD_LOSSES.register(
    "distribution",
    distribution,
    title="OPD, whole distributions",
    formula=r"$c\thinspace D(S(\cdot \mid s_t), T(\cdot \mid s_t))$",
    source="GKD, arXiv 2306.13649",
    proof="test_opd_losses.py::test_the_distribution_form_has_the_expected_gradient_of_the_sampled_one",
)
OPD_LOSSES.describe(
    "prompts beside responses",
    "--opd-include-prompt --opd-loss distribution",
    formula=r"$c\thinspace D(S(\cdot \mid s_t), T(\cdot \mid s_t))$ at the tokens of the prompt, too",
    source="",
    proof="megatron/test_distribution.py::test_prompts_are_compared_like_responses",
)
OPD_LOSSES.describe(
    "prefix OPD",
    "--opd-prefix-len N",
    formula=r"$\sum_{t \le N} \mathrm{KL}(S(\cdot \mid s_t) \Vert T(\cdot \mid s_t))$",
    source="arXiv 2602.15260",
    proof="test_exact_gradients.py::test_a_prefix_descends_the_kl_of_its_own_positions",
)
OPD_LOSSES.describe(
    "responses of the data",
    "--opd-student-data-fraction F --opd-data-response-key KEY --opd-loss distribution",
    formula=r"$c\thinspace D(S(\cdot \mid s_t), T(\cdot \mid s_t))$, $s_t$ from the data with probability $1 - F$",
    source="GKD, arXiv 2306.13649",
    proof="test_opd_losses.py::test_given_tokens_say_nothing_but_where_distributions_are_compared",
)
OPD_LOSSES.describe(
    "responses of the teacher",
    "--opd-student-data-fraction F --opd-data-source teacher --opd-loss distribution",
    formula=r"$c\thinspace D(S(\cdot \mid s_t), T(\cdot \mid s_t))$, $s_t$ from $T$ with probability $1 - F$",
    source="GKD, arXiv 2306.13649",
    proof="test_opd_losses.py::test_at_the_teachers_samples_forward_kl_is_the_likelihood_of_its_responses",
)
OPD_LOSSES.describe(
    "given responses by their tokens",
    "--opd-student-data-fraction F --opd-data-loss supervised",
    formula=r"$-c\thinspace \log S(a_t)$, $a$ of the data or of the teacher with probability $1 - F$",
    source="GKD, arXiv 2306.13649",
    proof="test_opd_losses.py::test_given_tokens_have_the_gradient_of_the_kl_from_their_law",
)
OPD_LOSSES.describe(
    "self-distillation",
    "--opd-teacher self --opd-self-context-key KEY [--opd-self-template TEXT] [--opd-self-feedback]",
    formula=r"$T(\cdot \mid s_t) = S_{\mathrm{self}}(\cdot \mid c, s_t)$, $c$ the privileged context",
    source="OPSD, arXiv 2601.18734; SDPO, arXiv 2601.20802",
    proof="test_opd_losses.py::test_self_distillation_moves_the_student_towards_what_it_says_with_the_context",
)
OPD_LOSSES.register(
    "kl_loss",
    kl_estimator,
    title="OPD, estimator as a loss",
    formula=r"$c \rho k_1,\quad c\thinspace \mathrm{sg}(\rho) k_2,\quad c \rho k_3$",
    source="Schulman, Approximating KL divergence, 2020",
    proof="test_opd_losses.py::test_the_estimators_have_the_gradient_of_the_reverse_kl",
    more_flags="--opd-kl-loss-type K",
)
