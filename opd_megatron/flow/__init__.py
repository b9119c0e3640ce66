"""From prompts to a finished rollout: sampling, rewards, filters and a streaming teacher as one pipeline."""

from opd_megatron.flow.build import policy_of, scores_later, stages_of
from opd_megatron.flow.failures import FailurePolicy
from opd_megatron.flow.filters import FilterError, GroupFilter, build_filter
from opd_megatron.flow.overlong import score_rollout
from opd_megatron.flow.pipeline import Rollout, RolloutFlow, Stages
from opd_megatron.flow.student_ids import StudentIdsTeacher

__all__ = [
    "FailurePolicy",
    "FilterError",
    "GroupFilter",
    "Rollout",
    "RolloutFlow",
    "Stages",
    "StudentIdsTeacher",
    "build_filter",
    "policy_of",
    "score_rollout",
    "scores_later",
    "stages_of",
]
