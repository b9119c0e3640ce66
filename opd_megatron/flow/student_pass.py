"""The student's own pass over a finished rollout, under the weights that sampled it, before any optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_megatron.config.options import Options
from opd_megatron.config.resolve import needs_old_log_probs, selects_tokens
from opd_megatron.questions import LogProbs, Respondent, TokenStatistics
from opd_megatron.sample import Sample


def ask_student(options: Options, trainer: Respondent, samples: Sequence[Sample]) -> list[np.ndarray] | None:
    """Give samples their ``old_log_probs`` where these are used before the step; with token selection ``entropies``.

    Returns what token selection wants to know (``[T, 3]`` of each sample, see ``megatron.token_statistics``), or None.
    """
    if options.objective.loss_type != "policy_loss" or not needs_old_log_probs(options):
        return None
    if not selects_tokens(options.opd):
        for sample, log_probs in zip(samples, trainer.ask(LogProbs("student"), samples), strict=True):
            sample.old_log_probs = log_probs
        return None
    statistics = trainer.ask(TokenStatistics(), samples)
    for sample, known_T3 in zip(samples, statistics, strict=True):
        sample.old_log_probs, sample.entropies = known_T3[:, 0], known_T3[:, 1]
    return statistics
