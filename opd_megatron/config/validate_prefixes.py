"""Combinations of options that choose the prefixes of the distillation term."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.critic import has_critic
from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import has_task, is_self_taught, needs_student_ids


def prefix_faults(options: Options) -> Iterator[str]:
    """Every fault of the options that choose prefixes; the options have ``--use-opd``."""
    yield from _length_faults(options)
    yield from _data_faults(options)


def _length_faults(options: Options) -> Iterator[str]:
    length, longest = options.opd.opd_prefix_len, options.rollout.rollout_max_response_len
    if length is None:
        return
    if length >= longest:
        yield (f"--opd-prefix-len {length} has no effect: responses end at --rollout-max-response-len {longest} anyway")
    opd = options.opd
    by_rate = opd.opd_prompt_weight == "paced" and opd.opd_pass_rate != "metadata"
    if opd.opd_on != "all" or opd.opd_reward_beta is not None or by_rate:
        yield (
            "--opd-prefix-len leaves responses unfinished, of which no reward can judge: leave out --opd-on, "
            "--opd-reward-beta and pass rates of the student's own samples"
        )
    if opd.opd_mask_truncated:
        yield "--opd-mask-truncated leaves out every response that --opd-prefix-len ends: leave out one of them"
    if has_task(options):
        recorded = options.rollout.load_debug_rollout_data is not None  # with rewards of its own
        yield (
            "--opd-prefix-len leaves responses unfinished, of which a task reward cannot judge: use "
            f"{'' if recorded else '--rm-type zero or '}--advantage-estimator none"
        )


def _data_faults(options: Options) -> Iterator[str]:
    opd, given = options.opd, options.given
    if options.rollout.load_debug_rollout_data is not None:
        for name in ("opd_student_data_fraction", "opd_data_source", "opd_data_response_key"):
            if name in given:
                flag = flag_of(name)
                yield f"{flag} has no effect with --load-debug-rollout-data, whose responses are made: leave it out"
        return
    if opd.opd_student_data_fraction == 1.0:
        for name in ("opd_data_source", "opd_data_response_key", "opd_data_loss"):
            if name in given:
                yield f"{flag_of(name)} has no effect: give --opd-student-data-fraction below 1"
        return
    if opd.opd_data_source == "teacher":
        yield from _teacher_faults(options)
    elif opd.opd_data_response_key is None:
        yield (
            "--opd-student-data-fraction below 1 needs --opd-data-response-key: name the field of the prompt rows "
            "that holds a response, or let the teacher answer with --opd-data-source teacher"
        )
    if opd.opd_data_loss == "distribution" and opd.opd_loss != "distribution":
        yield f"--opd-data-loss distribution needs --opd-loss distribution, not {opd.opd_loss}: use supervised"
    for flag in student_only(options):
        yield f"--opd-student-data-fraction below 1 does not go with {flag}, which needs the student's own samples"


def _teacher_faults(options: Options) -> Iterator[str]:
    """What keeps a teacher from answering in the student's place."""
    opd, source = options.opd, "--opd-data-source teacher"
    if opd.opd_data_response_key is not None:
        yield f"--opd-data-response-key has no effect with {source}, which samples the responses: leave out one of them"
    if is_self_taught(options):
        yield (
            f"{source} does not go with --opd-teacher self, which would answer with samples of the student's own "
            "weights: take responses of the data, or another teacher"
        )
    if opd.opd_teacher_mixture is not None:
        yield (
            f"{source} does not go with --opd-teacher-mixture: the teachers are mixed where they score, and none of "
            "them samples as their mixture; take responses of the data"
        )
    if needs_student_ids(options):
        yield (
            f"{source} does not go with --opd-support student_topk and --opd-type sglang, whose servers are asked when "
            "the rollout is whole: use teacher_topk"
        )
    if options.rollout.custom_generate_function_path is not None:
        yield (
            f"{source} does not go with --custom-generate-function-path: the teacher would answer in one turn what the "
            "student answers by that function; take responses of the data"
        )


def student_only(options: Options) -> list[str]:
    """The options, as they are written, that mean something at responses of the student only."""
    opd, objective = options.opd, options.objective
    rated = opd.opd_prompt_weight == "paced" and opd.opd_pass_rate != "metadata"
    chosen = {
        f"--advantage-estimator {objective.advantage_estimator}": has_critic(options),
        "--use-kl-loss": objective.use_kl_loss,
        "--use-tis": objective.use_tis,
        "--custom-loss-path": objective.custom_loss_path is not None,
        f"--dynamic-filter {options.rollout.dynamic_filter}": options.rollout.dynamic_filter != "none",
        "--dynamic-filter-path": options.rollout.dynamic_filter_path is not None,
        f"--opd-on {opd.opd_on}": opd.opd_on != "all",
        "--opd-reward-beta": opd.opd_reward_beta is not None,
        "--opd-self-feedback": opd.opd_self_feedback,
        f"--opd-pass-rate {opd.opd_pass_rate}": rated,
    }
    return [flag for flag, used in chosen.items() if used]
