"""From options and parts to the stages of a rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from opd_megatron.config.options import Options
from opd_megatron.flow.failures import FailurePolicy
from opd_megatron.flow.filters import build_filter
from opd_megatron.flow.pipeline import PromptSource, SampleSource, Stages, TeacherAnswer
from opd_megatron.reward import RewardFunction
from opd_megatron.sample import Sample
from opd_megatron.teacher.protocol import StreamingTeacher


def scores_later(teacher: object) -> bool:
    """Whether the teacher scores whole rollouts, when they are finished, and not sample by sample."""
    return teacher is not None and not _streams(teacher)


def _streams(teacher: object) -> TypeGuard[StreamingTeacher]:
    return hasattr(teacher, "score_one")


def policy_of(options: Options) -> FailurePolicy:
    """What these options do about samples that the teacher cannot score."""
    opd = options.opd
    return FailurePolicy(
        on_failure=opd.opd_on_teacher_failure,
        on_overlong=opd.opd_overlong,
        max_failed_frac=opd.opd_max_failed_frac,
        deadline=opd.opd_teacher_step_deadline,
    )


def stages_of(
    options: Options,
    source: SampleSource,
    prompts: PromptSource,
    reward: RewardFunction | None,
    teacher: object,
    feedback: Callable[[Sample], None] | None = None,
    answer: TeacherAnswer | None = None,
) -> Stages:
    """What a rollout of these options goes through; a ``teacher`` that scores whole rollouts comes after it."""
    rollout = options.rollout
    if rollout.rollout_batch_size is None:
        raise ValueError("rollout_batch_size is not set")
    return Stages(
        source=source,
        prompts=prompts,
        batch=rollout.rollout_batch_size,
        copies=rollout.n_samples_per_prompt,
        # nothing is computed for a reward of zero, unless a filter looks at it
        reward=None if options.reward.rm_type == "zero" and rollout.dynamic_filter_path is None else reward,
        keep=build_filter(rollout),
        max_refills=rollout.dynamic_filter_max_refills * rollout.rollout_batch_size,
        feedback=feedback,
        teacher=teacher if _streams(teacher) else None,
        policy=policy_of(options),
        # The rounding of the local engine depends on what it decodes together.
        refill_at_once=options.engine.rollout_engine != "local",
        answer=answer,
    )
