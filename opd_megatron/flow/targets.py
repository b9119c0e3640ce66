"""What the distillation term compares with where that is not the teacher alone: references, scored before the step."""

from __future__ import annotations

from collections.abc import Sequence

from opd_megatron.config.options import Options
from opd_megatron.config.resolve import needs_reference
from opd_megatron.config.targets import REFERENCE, kept_reference, opd_reference_name
from opd_megatron.objectives.targets import extrapolated, implicit_reward_statistics
from opd_megatron.questions import LogProbs, Respondent
from opd_megatron.sample import Sample


def score_references(options: Options, trainer: Respondent, samples: Sequence[Sample]) -> None:
    """Give samples the log-probabilities of the references that the objective and the target name; each scores once."""
    own = opd_reference_name(options)
    for name in dict.fromkeys([REFERENCE] * needs_reference(options) + [own] * (own is not None)):
        assert name is not None
        scored = trainer.ask(LogProbs(name, keep_hidden=name == kept_reference(options)), samples)
        for sample, log_probs in zip(samples, scored, strict=True):
            if name == REFERENCE:
                sample.ref_log_probs = log_probs
            if name == own and sample.teacher_scores is not None:
                target = extrapolated(sample.teacher_scores.log_probs_T, log_probs, options.opd.opd_reward_scale)
                sample.opd_target = target.float().numpy()


def target_statistics(options: Options, samples: Sequence[Sample]) -> dict[str, float]:
    """``opd/implicit_reward`` where ``--opd-reward-scale`` makes one."""
    scored = [sample for sample in samples if sample.teacher_scores is not None and sample.opd_target is not None]
    if opd_reference_name(options) is None or not scored:
        return {}
    scores = [sample.teacher_scores for sample in scored]
    return implicit_reward_statistics(
        [score.log_probs_T for score in scores if score is not None],
        [sample.opd_target for sample in scored if sample.opd_target is not None],
        [sample.loss_mask & sample.teacher_scores.valid_T for sample in scored if sample.teacher_scores is not None],
        scale=options.opd.opd_reward_scale,
    )
