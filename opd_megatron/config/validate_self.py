"""Combinations of options of a student that is its own teacher."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import Options
from opd_megatron.config.resolve import needs_reference, reference_folder, teaches_itself_now

SELF_ONLY = (
    "opd_self_weights",
    "opd_self_ema_decay",
    "opd_self_context_key",
    "opd_self_feedback",
    "opd_self_template",
)
"""Options that say nothing about another teacher."""

_EXTERNAL_ONLY = (
    "opd_teacher_load",
    "opd_teacher_ckpt_step",
    "opd_teacher_dtype",
    "opd_teacher_tensor_model_parallel_size",
    "opd_teacher_pipeline_model_parallel_size",
    "opd_teacher_expert_model_parallel_size",
    "opd_teacher_expert_tensor_parallel_size",
)
"""Options of a teacher with weights and a layout of its own."""


def self_teacher_faults(options: Options) -> Iterator[str]:
    """Every fault of ``--opd-teacher self`` and what belongs to it; the options have ``--use-opd``."""
    opd, given = options.opd, options.given
    if opd.opd_teacher != "self":
        for name in (name for name in SELF_ONLY if name in given):
            yield f"{flag_of(name)} goes with --opd-teacher self only"
        return
    for name in (name for name in _EXTERNAL_ONLY if name in given):
        yield f"{flag_of(name)} does not go with --opd-teacher self, which has the student's weights and layout"
    for name in (name for name in ("opd_more_teachers", "opd_teacher_mixture") if name in given):
        yield f"{flag_of(name)} does not go with --opd-teacher self, which is one teacher"
    if opd.opd_include_prompt:
        yield "--opd-include-prompt does not go with --opd-teacher self, which reads another prompt than the student"
    if "opd_self_ema_decay" in given and opd.opd_self_weights != "ema":
        yield "--opd-self-ema-decay goes with --opd-self-weights ema only"
    if opd.opd_type == "sglang":
        yield from _server_faults(options)
    if options.rollout.load_debug_rollout_data is not None:
        return
    if opd.opd_self_feedback:
        yield from _feedback_faults(options)
    if opd.opd_self_context_key is None:
        if "opd_self_template" not in given:
            yield (
                "--opd-teacher self would see what the student sees: name the privileged text by "
                "--opd-self-context-key, or give another --opd-self-template"
            )
        elif "{context}" in opd.opd_self_template:
            yield "--opd-self-template holds {context}: name its field by --opd-self-context-key"
    elif "{context}" not in opd.opd_self_template:
        yield "--opd-self-context-key has no effect: put {context} into --opd-self-template"
    if opd.opd_type != "megatron":
        return
    if opd.opd_overlong == "drop":
        yield (
            "--opd-overlong drop replaces samples during the rollout, which --opd-type megatron scores afterwards: "
            "choose stop or mask"
        )
    if "opd_max_failed_frac" in given and opd.opd_overlong == "stop":
        yield "--opd-max-failed-frac has no effect with --opd-overlong stop: choose mask"


def _feedback_faults(options: Options) -> Iterator[str]:
    """Whether somebody gives the feedback, and where."""
    if options.opd.opd_self_context_key is None:
        yield "--opd-self-feedback needs --opd-self-context-key: name the field of the metadata that holds the feedback"
    if options.reward.custom_rm_path is None and options.rollout.custom_generate_function_path is None:
        yield (
            "--opd-self-feedback needs a function that gives the feedback: --custom-rm-path, or "
            "--custom-generate-function-path"
        )
    if options.opd.opd_prefix_len is not None:
        yield "--opd-prefix-len leaves responses unfinished, of which no feedback can speak: leave out one of them"


def _server_faults(options: Options) -> Iterator[str]:
    """Who among the servers has the weights that are asked for."""
    opd = options.opd
    if "opd_teachers" in options.given:
        yield "--opd-teachers does not go with --opd-teacher self, which is one teacher: leave it out"
    if opd.opd_self_weights == "ema":
        yield "--opd-self-weights ema needs --opd-type megatron: no server has the moving average"
    if opd.opd_self_weights != "current":
        return
    if opd.opd_support == "student_topk":
        yield "--opd-support student_topk is not asked of the rollout engine's servers: use teacher_topk"
    if options.engine.rollout_engine != "sglang":
        yield (
            "--opd-self-weights current with --opd-type sglang needs --rollout-engine sglang, whose servers have the "
            "current weights: choose it, or --opd-type megatron"
        )
    for name in (name for name in ("opd_teacher_url", "opd_teacher_api_key_env") if name in options.given):
        yield f"{flag_of(name)} has no effect with --opd-self-weights current: the rollout engine's servers are asked"


def self_teacher_weight_faults(options: Options) -> Iterator[str]:
    """Whether the weights of ``--opd-teacher self`` are there, and can leave the device where that is asked for."""
    if not (options.opd.use_opd and options.opd.opd_teacher == "self"):
        return
    if options.rollout.load_debug_rollout_data is not None or options.checkpoint.hf_checkpoint is None:
        return
    in_trainer = options.opd.opd_type == "megatron" and options.opd.opd_self_weights == "frozen"
    if in_trainer and reference_folder(options) is None:
        yield "--opd-self-weights frozen needs weights to keep: give --ref-load, or weights in --hf-checkpoint"
    if options.offload.offload_teacher and teaches_itself_now(options) and not needs_reference(options):
        yield (
            "--offload-teacher has no effect with --opd-self-weights current, which are the student's own: leave it out"
        )
