"""Which divergence ``--opd-loss distribution`` minimises, as the options and the number of the rollout say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from opd_megatron.config.options import OpdOptions
from opd_megatron.objectives.catalogue import Catalogue
from opd_megatron.objectives.divergences import (
    Divergence,
    alpha_divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    weighted_sum,
)

MakeDivergence: TypeAlias = Callable[[OpdOptions], Divergence]

DIVERGENCES: Catalogue[MakeDivergence] = Catalogue("Divergences", "--opd-divergence")
_PROOF = "test_divergences.py::test_the_slopes_give_the_gradient_of_the_definitions"
_OF_A_STEP = "megatron/test_distribution.py::test_the_gradient_of_a_step_is_that_of_the_divergence"
_OF_TWO = "test_opd_losses.py::test_a_schedule_leads_from_one_divergence_to_the_other"

DIVERGENCES.register(
    "reverse_kl",
    lambda opd: reverse_kl,
    title="reverse KL",
    formula=r"$\mathrm{KL}(S \Vert T)$",
    source="MiniLLM, arXiv 2306.08543",
    proof=_PROOF,
)
DIVERGENCES.register(
    "forward_kl",
    lambda opd: forward_kl,
    title="forward KL",
    formula=r"$\mathrm{KL}(T \Vert S)$",
    source="arXiv 1503.02531",
    proof=_PROOF,
)
DIVERGENCES.register(
    "jsd",
    lambda opd: jensen_shannon(opd.opd_jsd_beta, scaled=opd.opd_jsd_scaled),
    title="generalised Jensen-Shannon",
    formula=r"$\beta\thinspace \mathrm{KL}(T \Vert m) + (1-\beta)\thinspace \mathrm{KL}(S \Vert m)$, "
    r"$m = \beta T + (1-\beta) S$; scaled: over $\beta(1-\beta)$; "
    r"$\beta = 0$: $\mathrm{KL}(T \Vert S)$, $\beta = 1$: $\mathrm{KL}(S \Vert T)$",
    source="GKD, arXiv 2306.13649",
    proof=_PROOF,
    more_flags="--opd-jsd-beta B [--opd-jsd-scaled]",
)
DIVERGENCES.describe(
    "Jensen-Shannon of a changing weight",
    "--opd-divergence jsd --opd-jsd-scaled --opd-jsd-beta-end B --opd-divergence-schedule START:END",
    formula=r"$\mathrm{JSD}_\beta / (\beta (1-\beta))$ with $\beta$ along a line; $\beta \to 0$: "
    r"$\mathrm{KL}(T \Vert S)$, $\beta \to 1$: $\mathrm{KL}(S \Vert T)$",
    source="GKD, arXiv 2306.13649",
    proof="test_opd_losses.py::test_beta_leads_from_one_kl_to_the_other_without_a_jump",
)
DIVERGENCES.register(
    "skew_kl",
    lambda opd: skew_kl(opd.opd_skew),
    title="skew KL",
    formula=r"$\mathrm{KL}(T \Vert \lambda T + (1-\lambda) S)$",
    source="DistiLLM, arXiv 2402.03898",
    proof=_PROOF,
    more_flags="--opd-skew L",
)
DIVERGENCES.register(
    "skew_reverse_kl",
    lambda opd: skew_reverse_kl(opd.opd_skew),
    title="skew reverse KL",
    formula=r"$\mathrm{KL}(S \Vert (1-\lambda) T + \lambda S)$",
    source="DistiLLM, arXiv 2402.03898",
    proof=_PROOF,
    more_flags="--opd-skew L",
)
DIVERGENCES.register(
    "alpha",
    lambda opd: alpha_divergence(opd.opd_alpha),
    title="alpha divergence",
    formula=r"$\frac{\sum T^\alpha S^{1-\alpha} - 1}{\alpha(\alpha-1)}$",
    source="Amari, Differential-Geometrical Methods in Statistics, 1985",
    proof=_PROOF,
    more_flags="--opd-alpha A",
)

DIVERGENCES.describe(
    "weighted sum of two",
    "--opd-divergence-to D --opd-divergence-mix W",
    formula="$(1-w) D_1 + w D_2$",
    source="",
    proof=_OF_TWO,
)
DIVERGENCES.describe(
    "from one to the other",
    "--opd-divergence-to D --opd-divergence-schedule START:END",
    formula=r"$(1-w) D_1 + w D_2$, $w$ from 0 along a line between two rollouts",
    source="PACED, arXiv 2603.11178",
    proof=_OF_TWO,
)
for _side in ("teacher", "student"):
    DIVERGENCES.describe(
        f"most probable tokens of the {_side} and a tail",
        f"--opd-support {_side}_topk --opd-top-k K --opd-tail bucket",
        formula="$D$ of $K + 1$ classes: the tokens, and all others as one",
        source="log-sum inequality",
        proof=_OF_A_STEP,
    )
DIVERGENCES.describe(
    "most probable tokens alone",
    "--opd-support teacher_topk --opd-top-k K --opd-tail renormalized",
    formula=r"$D$ of $S(a) / \sum_K S$ and $T(a) / \sum_K T$",
    source="",
    proof=_OF_A_STEP,
)
DIVERGENCES.describe(
    "temperature of the comparison",
    "--opd-temperature TAU",
    formula=r"$D(\mathrm{softmax}(z_S / \tau), \mathrm{softmax}(z_T / \tau))$, no factor $\tau^2$",
    source="arXiv 1503.02531",
    proof=_OF_A_STEP,
)
DIVERGENCES.describe(
    "entropy-aware",
    "--opd-entropy-aware W",
    formula=r"$D + w\thinspace \frac{H(T)}{\ln V}\thinspace \mathrm{KL}(T \Vert S)$",
    source="cf. arXiv 2603.07079",
    proof="test_divergences.py::test_entropy_aware_distillation_is_its_formula",
)


def chosen_divergence(opd: OpdOptions, rollout_id: int) -> Divergence:
    """``(1 - w) D1 + w D2`` with ``w`` of :func:`mixing_weight`; ``D1`` alone without ``--opd-divergence-to``.

    A Jensen-Shannon divergence has the beta of :func:`jsd_beta`.
    """
    opd = replace(opd, opd_jsd_beta=jsd_beta(opd, rollout_id))
    first = DIVERGENCES[opd.opd_divergence](opd)
    if opd.opd_divergence_to is None:
        return first
    weight = mixing_weight(opd, rollout_id)
    return weighted_sum([(1.0 - weight, first), (weight, DIVERGENCES[opd.opd_divergence_to](opd))])


def mixing_weight(opd: OpdOptions, rollout_id: int) -> float:
    """Weight of ``--opd-divergence-to`` in rollout ``rollout_id`` (from 0).

    ``--opd-divergence-mix`` (default 1), which ``--opd-divergence-schedule START:END`` reaches by a straight line.
    """
    final = 1.0 if opd.opd_divergence_mix is None else opd.opd_divergence_mix
    return final * _way(opd, rollout_id)


def jsd_beta(opd: OpdOptions, rollout_id: int) -> float:
    """``--opd-jsd-beta``, or where the line to ``--opd-jsd-beta-end`` is in rollout ``rollout_id`` (from 0).

    It leads through the rollouts of ``--opd-divergence-schedule``. The divergence must be scaled, or its size would
    change with beta, to nothing at both ends.
    """
    if opd.opd_jsd_beta_end is None:
        return opd.opd_jsd_beta
    way = _way(opd, rollout_id)
    return (1.0 - way) * opd.opd_jsd_beta + way * opd.opd_jsd_beta_end


def divergence_metrics(opd: OpdOptions, rollout_id: int) -> dict[str, float]:
    """``opd/jsd_beta`` where it changes."""
    return {} if opd.opd_jsd_beta_end is None else {"opd/jsd_beta": jsd_beta(opd, rollout_id)}


def _way(opd: OpdOptions, rollout_id: int) -> float:
    """From 0 before ``--opd-divergence-schedule START:END`` to 1 behind it, and 1 without one."""
    if opd.opd_divergence_schedule is None:
        return 1.0
    start, end = map(int, opd.opd_divergence_schedule.split(":"))
    return min(max((rollout_id - start) / (end - start), 0.0), 1.0)


def opd_coefficient(opd: OpdOptions, rollout_id: int) -> float:
    """``--opd-kl-coef``, or where the line from it to ``--opd-kl-coef-end`` is in rollout ``rollout_id`` (from 0)."""
    if opd.opd_kl_coef_end is None or opd.opd_kl_coef_rollouts is None:
        return opd.opd_kl_coef
    way = min(rollout_id / opd.opd_kl_coef_rollouts, 1.0)
    return opd.opd_kl_coef + way * (opd.opd_kl_coef_end - opd.opd_kl_coef)
