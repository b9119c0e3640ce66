"""Samples of ``--load-debug-rollout-data``: read, and looked at before they are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opd_megatron.config.errors import UserError
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import student_architecture
from opd_megatron.config.validate_prefixes import student_only
from opd_megatron.objectives.advantages import chosen_estimator
from opd_megatron.sample import LARGEST_REWARD, Sample, read_samples


def recorded_samples(options: Options, path: Path) -> list[Sample]:
    """The samples of a recording that fits this run; raises ``UserError`` where it does not."""
    if not path.is_file():
        raise UserError(f"--load-debug-rollout-data: {path} does not exist")
    try:
        samples = list(read_samples(path))
    except ValueError as error:
        raise UserError(f"--load-debug-rollout-data: {error}") from error
    if len(samples) != options.samples_per_rollout:
        raise UserError(
            f"--load-debug-rollout-data: {path} has {len(samples)} samples, --rollout-batch-size times "
            f"--n-samples-per-prompt is {options.samples_per_rollout}"
        )
    if options.opd.use_opd and any(sample.teacher_scores is None for sample in samples):
        raise UserError(f"--load-debug-rollout-data: {path} has samples without teacher scores, which --use-opd needs")
    for sample in samples:
        fault = _recorded_fault(sample, options)
        if fault:
            raise UserError(f"--load-debug-rollout-data: {path}, sample {sample.index}: {fault}")
    return samples


def _recorded_fault(sample: Sample, options: Options) -> str | None:
    """What makes a recorded sample unfit for this run, or None."""
    if not isinstance(sample.reward, int | float | None):
        return "the reward is not a number"
    if not abs(sample.reward or 0.0) <= LARGEST_REWARD:
        return f"the reward is {sample.reward:g}, not a finite number that a float32 holds"
    if not len(sample.prompt_tokens):
        return "the prompt has no tokens"
    student = student_architecture(options)
    if len(sample.tokens) and (sample.tokens.min() < 0 or sample.tokens.max() >= student.vocab_size):
        return "a token is not in the student's vocabulary"
    if len(sample.tokens) > student.max_position_embeddings:
        return f"it has {len(sample.tokens)} tokens, the student {student.max_position_embeddings} positions"
    excluding = student_only(options) if sample.from_data else []
    if excluding:
        return f"its response is not the student's, and {excluding[0]} needs the student's own samples"
    objective = options.objective
    if objective.loss_type == "policy_loss":
        if objective.use_tis and sample.rollout_log_probs is None:
            return "it has no log-probabilities of the rollout engine, which --use-tis needs"
        if chosen_estimator(objective).needs_greedy and not sample.from_data and sample.greedy_reward is None:
            return f"it has no greedy_reward, which --advantage-estimator {objective.advantage_estimator} needs"
    scores = sample.teacher_scores
    if scores is None or not options.opd.use_opd:
        return None
    scored = scores.log_probs_T[scores.valid_T]
    if np.isnan(scored).any() or (scored > 1e-3).any():
        return "the teacher's scores are no log-probabilities"
    if not len(scored):
        return None
    top = scores.top_ids_TK
    if options.opd.opd_loss == "distribution" and (top is None or top.shape[1] != options.opd.opd_top_k):
        return f"the teacher's scores do not hold the {options.opd.opd_top_k} most probable tokens of each position"
    wanted = options.rollout.rollout_temperature
    if scores.temperature != wanted and not options.opd.opd_allow_sampling_mismatch:
        return f"the teacher scored at temperature {scores.temperature:g}, --rollout-temperature is {wanted:g}"
    return None
