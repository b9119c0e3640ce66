"""A teacher that scores whole rollouts, and the samples that are too long for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from opd_megatron.config.options import Options
from opd_megatron.config.resolve import is_self_taught, student_architecture
from opd_megatron.flow.build import policy_of
from opd_megatron.flow.failures import FailureCount
from opd_megatron.flow.masking import mask
from opd_megatron.sample import Sample
from opd_megatron.teacher.protocol import FailureKind, Teacher, TeacherFailure


def score_rollout(options: Options, teacher: Teacher, samples: Sequence[Sample]) -> None:
    """Attach the scores of a teacher that takes whole rollouts to the samples that have none yet.

    A student that is its own teacher has as many positions as it has: responses that do not fit behind their context
    are masked as ``--opd-overlong`` says. Raises :class:`~opd_megatron.teacher.protocol.TeacherError` where there are
    too many of them.
    """
    policy = policy_of(options)
    failures = FailureCount(policy, len(samples))
    positions = student_architecture(options).max_position_embeddings if is_self_taught(options) else None
    asked = []
    for sample in samples:
        if positions is not None and len(sample.seen_by_teacher().tokens) > positions:
            failures.add(_overlong(sample, positions))
            mask(sample, FailureKind.OVERLONG, teacher.name)
            # What stands in for it fits, since the student sampled it; nobody reads its scores.
            sample = dataclasses.replace(sample, teacher_prompt_tokens=None)
        asked.append(sample)
    for sample, scores in zip(samples, teacher.score(asked), strict=True):
        if sample.teacher_scores is None:
            sample.teacher_scores = scores
        sample.validate()


def _overlong(sample: Sample, positions: int) -> TeacherFailure:
    tokens = len(sample.seen_by_teacher().tokens)
    return TeacherFailure(
        f"sample {sample.index} has {tokens} tokens with what --opd-teacher self sees of its prompt, the model "
        f"{positions} positions: shorten the contexts, or choose --opd-overlong mask",
        FailureKind.OVERLONG,
    )
