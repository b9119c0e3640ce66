"""The student's own pass over a finished rollout, under the weights that sampled it, before any optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_megatron.config.options import Options
from opd_megatron.config.resolve import (
    measures_diagnostics,
    needs_old_log_probs,
    selects_by_divergence,
    selects_tokens,
)
from opd_megatron.questions import Respondent, StudentTokens
from opd_megatron.sample import Sample


def ask_student(
    options: Options, trainer: Respondent, samples: Sequence[Sample], rollout_id: int
) -> list[np.ndarray] | None:
    """One pass for all that is wanted of the student before the step; None where nothing is, and no pass.

    Samples get their ``old_log_probs`` where these are used before the step, with token selection ``entropies``.
    Returns what token selection and the diagnostics of rollout ``rollout_id`` want to know: the answers to
    :class:`~opd_megatron.questions.StudentTokens`.
    """
    opd = options.opd
    looks_back = options.objective.loss_type == "policy_loss" and needs_old_log_probs(options)
    measures = opd.use_opd and measures_diagnostics(opd, rollout_id)
    if not looks_back and not measures:
        return None
    question = StudentTokens(divergence=looks_back and selects_by_divergence(opd), diagnostics=measures)
    answers = trainer.ask(question, samples)
    if looks_back:
        for sample, answer in zip(samples, answers, strict=True):
            sample.old_log_probs = answer["student_log_prob"]
            if selects_tokens(opd):
                sample.entropies = answer["student_entropy"]
    return answers
