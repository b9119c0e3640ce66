"""A closer look at the distillation in the rollouts that the options name, before their optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_megatron.assembly import Parts
from opd_megatron.config.resolve import has_reward, measures_diagnostics, measures_gradients
from opd_megatron.objectives.diagnostics import (
    distillation_statistics,
    outcome_statistics,
    repetition,
    scored_tokens,
    teacher_statistics,
)
from opd_megatron.rollout.evaluate import PASS_ABOVE
from opd_megatron.sample import Sample, sampled_by_student


def diagnose(
    parts: Parts, samples: Sequence[Sample], rollout_id: int, answers: Sequence[np.ndarray] | None
) -> dict[str, float]:
    """What ``--opd-diagnostics-interval`` and ``--opd-gradient-diagnostics-interval`` ask for in this rollout.

    The samples have their advantages and the teacher's scores; ``answers`` are those of the student's pass before the
    step (:func:`~opd_megatron.flow.student_pass.ask_student`). Nothing about weights or samples changes.
    """
    metrics: dict[str, float] = {}
    opd = parts.options.opd
    if measures_diagnostics(opd, rollout_id):
        assert answers is not None
        metrics |= _of_tokens(parts, samples, answers)
    if measures_gradients(opd, rollout_id):
        metrics |= parts.trainer.gradient_diagnostics(samples, rollout_id)
    return metrics


def _of_tokens(parts: Parts, samples: Sequence[Sample], answers: Sequence[np.ndarray]) -> dict[str, float]:
    arrays = [answer for answer, sample in zip(answers, samples, strict=True) if not sample.from_data]
    samples = sampled_by_student(samples)
    if not samples:
        return {}
    scores = [sample.teacher_scores for sample in samples if sample.teacher_scores is not None]
    tokens = scored_tokens(
        [{name: array[name] for name in array.dtype.names or ()} for array in arrays],
        [score.log_probs_T for score in scores],
        [sample.loss_mask for sample in samples],
        [score.valid_T for score in scores],
    )
    metrics = distillation_statistics(tokens) | teacher_statistics(tokens, [score.teacher for score in scores])
    if has_reward(parts.options):
        metrics |= outcome_statistics(tokens, [(sample.reward or 0.0) > PASS_ABOVE for sample in samples])
    return metrics | {"rollout/repetition": repetition([sample.response_tokens.tolist() for sample in samples])}
