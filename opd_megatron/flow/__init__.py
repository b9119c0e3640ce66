"""From prompts to a finished rollout: sampling, rewards, filters and a streaming teacher as one pipeline."""

from opd_megatron.flow.build import scores_later, stages_of
from opd_megatron.flow.failures import FailurePolicy
from opd_megatron.flow.filters import FilterError, GroupFilter, build_filter
from opd_megatron.flow.overlong import score_rollout
from opd_megatron.flow.pipeline import Rollout, RolloutFlow, Stages

__all__ = [
    "FailurePolicy",
    "FilterError",
    "GroupFilter",
    "Rollout",
    "RolloutFlow",
    "Stages",
    "build_filter",
    "score_rollout",
    "scores_later",
    "stages_of",
]
