"""Samples that the teacher could not score, and that are trained on all the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from opd_megatron.config.options import Options
from opd_megatron.objectives.weights import scored_opd_weights, step_weights
from opd_megatron.sample import Sample, TeacherScores
from opd_megatron.teacher.protocol import FailureKind


def mask(sample: Sample, kind: FailureKind, teacher: str) -> TeacherScores:
    """Leave the sample out of the distillation term, since the teacher failed."""
    sample.teacher_failure = str(kind)
    return leave_out(sample, teacher)


def leave_out(sample: Sample, teacher: str = "") -> TeacherScores:
    """Give the sample scores that are valid nowhere and no number to mistake for one."""
    length = sample.response_length
    sample.teacher_scores = TeacherScores(
        np.full(length, np.nan, dtype=np.float32), np.zeros(length, dtype=np.bool_), teacher=teacher
    )
    return sample.teacher_scores


def complete_masked(samples: Sequence[Sample]) -> None:
    """Give samples that are left out every field that the scores of the others have, as the likeliest tokens: zeros."""
    scores = [sample.teacher_scores for sample in samples if sample.teacher_scores is not None]
    for item in fields(TeacherScores):
        known = [getattr(score, item.name) for score in scores]
        like = next((array for array in known if isinstance(array, np.ndarray)), None)
        for score, array in zip(scores, known, strict=True):
            if like is not None and array is None:
                setattr(score, item.name, np.zeros((len(score.log_probs_T), *like.shape[1:]), like.dtype))


def complete_unscored(options: Options, samples: Sequence[Sample]) -> None:
    """Where no sample was scored, the most probable tokens of ``--opd-loss distribution``, which nobody will read."""
    scored = (sample.teacher_scores is not None and sample.teacher_scores.valid_T.any() for sample in samples)
    if options.opd.opd_loss != "distribution" or any(scored):
        return
    k = options.opd.opd_top_k or 1
    for sample in samples:
        assert sample.teacher_scores is not None
        sample.teacher_scores.top_ids_TK = np.zeros((sample.response_length, k), dtype=np.int32)
        sample.teacher_scores.top_log_probs_TK = np.zeros((sample.response_length, k), dtype=np.float32)
        sample.teacher_scores.tail_log_mass_T = np.zeros(sample.response_length, dtype=np.float32)


def leave_out_failed(options: Options, samples: Sequence[Sample]) -> None:
    """Where the teacher failed for some samples, let the others' distillation term keep its size in each step."""
    if all(sample.teacher_failure is None for sample in samples):
        return
    size = options.global_batch_size
    for first in range(0, len(samples), size):
        step = samples[first : first + size]
        weights = step_weights(options.objective, [sample.loss_mask for sample in step])
        scored = [sample.teacher_failure is None for sample in step]
        for sample, opd_weights_T in zip(step, scored_opd_weights(weights, scored), strict=True):
            sample.opd_weights = opd_weights_T.numpy()
