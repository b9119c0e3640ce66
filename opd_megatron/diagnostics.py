"""What a rollout says about itself: of its tokens in every one, and more in those that the options name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from opd_megatron.assembly import Parts
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import has_reward, measures_diagnostics, measures_gradients
from opd_megatron.flow.targets import target_statistics
from opd_megatron.objectives.diagnostics import (
    ScoredTokens,
    distillation_statistics,
    outcome_statistics,
    repetition,
    scored_tokens,
    teacher_statistics,
)
from opd_megatron.objectives.opd import reverse_kl_statistics
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
        metrics |= _of_tokens(samples, answers)
    if measures_gradients(opd, rollout_id):
        metrics |= parts.trainer.gradient_diagnostics(samples, rollout_id)
    return metrics


def look_at_samples(options: Options, samples: Sequence[Sample], student: Sequence[np.ndarray]) -> dict[str, float]:
    """What the student's own samples tell by their tokens and log-probabilities alone, in every rollout.

    ``student`` are the log-probabilities ``[T]`` of each of ``samples`` under the weights that sampled.
    """
    if not samples:
        return {}
    metrics = {"rollout/repetition": repetition([sample.response_tokens for sample in samples])}
    if not options.opd.use_opd:
        return metrics
    measured = [{"student_log_prob": log_probs_T} for log_probs_T in student]
    tokens, scores = _scored(samples, measured), [sample.teacher_scores for sample in samples]
    metrics |= teacher_statistics(tokens, [score.teacher for score in scores if score is not None])
    if has_reward(options):
        metrics |= outcome_statistics(tokens, [(sample.reward or 0.0) > PASS_ABOVE for sample in samples])
    distance = reverse_kl_statistics(
        student,
        [score.log_probs_T for score in scores if score is not None],
        [sample.loss_mask for sample in samples],
        [score.valid_T for score in scores if score is not None],
    )
    return metrics | distance | target_statistics(options, samples)


def _of_tokens(samples: Sequence[Sample], answers: Sequence[np.ndarray]) -> dict[str, float]:
    arrays = [answer for answer, sample in zip(answers, samples, strict=True) if not sample.from_data]
    samples = sampled_by_student(samples)
    if not samples:
        return {}
    measured = [{name: array[name] for name in array.dtype.names or ()} for array in arrays]
    return distillation_statistics(_scored(samples, measured))


def _scored(samples: Sequence[Sample], measured: Sequence[Mapping[str, np.ndarray]]) -> ScoredTokens:
    scores = [sample.teacher_scores for sample in samples if sample.teacher_scores is not None]
    return scored_tokens(
        measured,
        [score.log_probs_T for score in scores],
        [sample.loss_mask for sample in samples],
        [score.valid_T for score in scores],
    )
