"""Distillation by whole distributions: which divergence, over which tokens, and its way through the run."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config import checks
from opd_megatron.config.declare import option

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "alpha")
"""Divergences that options can name."""


@dataclass(frozen=True)
class DistributionOptions:
    """Distillation by whole distributions"""

    opd_divergence: str = option("reverse_kl", "divergence of --opd-loss distribution", choices=DIVERGENCES)
    opd_divergence_to: str | None = option(
        None, "second divergence, mixed in or reached by --opd-divergence-schedule", choices=DIVERGENCES
    )
    opd_divergence_mix: float | None = option(
        None, "weight of --opd-divergence-to; the first divergence has the rest", minimum=0.0, maximum=1.0
    )
    opd_divergence_schedule: str | None = option(
        None,
        "rollouts START:END over which the weight of --opd-divergence-to rises from 0 to --opd-divergence-mix "
        "(default 1), and beta goes to --opd-jsd-beta-end",
        metavar="START:END",
        check=checks.rollout_range,
    )
    opd_jsd_beta: float = option(
        0.5, "weight of the teacher in the mixture of jsd (0: forward KL, 1: reverse KL)", minimum=0.0, maximum=1.0
    )
    opd_jsd_beta_end: float | None = option(
        None,
        "beta that --opd-jsd-beta changes to, linearly over --opd-divergence-schedule (with --opd-jsd-scaled)",
        minimum=0.0,
        maximum=1.0,
    )
    opd_jsd_scaled: bool = option(False, "divide jsd by beta (1 - beta), continuous to both ends")
    opd_skew: float = option(
        0.1, "share of the own distribution in the mixture of the skew divergences", minimum=0.0, below=1.0
    )
    opd_alpha: float = option(0.5, "order of alpha (0: reverse KL, 1: forward KL)", minimum=0.0, maximum=1.0)
    opd_support: str = option(
        "full",
        "tokens that are compared one by one: the vocabulary, or the --opd-top-k most probable of teacher or student",
        choices=("full", "teacher_topk", "student_topk"),
    )
    opd_top_k: int | None = option(None, "tokens of the support", minimum=1, maximum=65536)
    opd_tail: str = option(
        "bucket",
        "the tokens outside the support: bucket, together one more class; renormalized, left out and both "
        "distributions rescaled",
        choices=("bucket", "renormalized"),
    )
    opd_temperature: float | None = option(
        None, "temperature of both distributions (default: --rollout-temperature)", above=0.0
    )
    opd_entropy_aware: float = option(
        0.0,
        "add this times the forward KL, weighted at each token by the teacher's entropy over that of the uniform "
        "distribution",
        minimum=0.0,
    )
