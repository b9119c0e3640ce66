"""Combinations of distillation options that cannot mean anything, or not what they seem to."""

from __future__ import annotations

import dataclasses

from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import OpdOptions, Options
from opd_megatron.config.resolve import has_megatron_teacher, is_self_taught, knows_teacher, needs_teacher_hidden
from opd_megatron.config.teachers_file import read_teachers
from opd_megatron.config.validate_diagnostics import diagnostics_faults
from opd_megatron.config.validate_distribution import distribution_faults
from opd_megatron.config.validate_prefixes import prefix_faults
from opd_megatron.config.validate_self import SELF_ONLY, self_teacher_faults
from opd_megatron.config.validate_targets import OF_MIXTURE, target_faults
from opd_megatron.config.validate_weights import weight_faults

_SGLANG_ONLY = (
    "opd_teacher_url",
    "opd_teachers",
    "opd_teacher_route_key",
    "opd_teacher_api_key_env",
    "opd_teacher_max_in_flight",
    "opd_teacher_timeout",
    "opd_teacher_max_retries",
    "opd_overlong",
    "opd_max_union_ids",
    "opd_on_teacher_failure",
    "opd_max_failed_frac",
    "opd_teacher_step_deadline",
)
_WHERE_IT_IS_LONG = ("opd_overlong", "opd_max_failed_frac")
"""Options of servers that a student as its own teacher has, too: its prompts are longer with their context."""
_MEGATRON_ONLY = (
    "opd_teacher_load",
    "opd_teacher_ckpt_step",
    "opd_teacher_dtype",
    "opd_teacher_micro_batch_size",
    "opd_teacher_max_tokens_per_gpu",
    "opd_teacher_tensor_model_parallel_size",
    "opd_teacher_pipeline_model_parallel_size",
    "opd_teacher_expert_model_parallel_size",
    "opd_teacher_expert_tensor_parallel_size",
    "opd_teacher_hidden_dtype",
    "opd_exact_kl_interval",
    "opd_baseline",
    "opd_more_teachers",
)


def opd_faults(options: Options) -> list[str]:
    """Every fault of the ``--opd-*`` options among themselves and with the sampling options."""
    opd = options.opd
    # those of a file may stay where the command line switches distillation, or the teacher, off
    idle = [name for name in idle_opd_options(options) if name in options.typed]
    if not opd.use_opd:
        faults = [f"{flag_of(name)} has no effect without --use-opd: add it" for name in idle]
        if options.objective.loss_type == "policy_loss" and options.objective.advantage_estimator == "none":
            faults.append("--advantage-estimator none leaves nothing to learn from: add --use-opd or name an estimator")
        return faults
    faults = [
        f"{flag_of(name)} has no effect with --load-debug-rollout-data, which holds the teacher's scores: leave it out"
        for name in idle
    ]
    if options.objective.loss_type == "sft_loss":
        faults.append("--use-opd does not go with --loss-type sft_loss, which samples nothing: leave out one of them")
    if opd.opd_type is None:
        faults.append("--use-opd needs --opd-type: choose sglang or megatron")
    elif opd.opd_type == "megatron":
        faults += _megatron_faults(options)
    else:
        faults += _sglang_faults(options)
    faults += [*distribution_faults(options), *self_teacher_faults(options), *prefix_faults(options)]
    faults += weight_faults(options)
    faults += diagnostics_faults(options)
    faults += target_faults(options)
    if not opd.opd_allow_sampling_mismatch:
        faults += _sampling_faults(options)
    return faults


def idle_opd_options(options: Options) -> list[str]:
    """Names of the ``opd_*`` options that are given and have no effect.

    All of them without ``use_opd``, and those of the teacher with recorded rollouts, which need none.
    """
    names: tuple[str, ...] = ()
    if not options.opd.use_opd:
        names = tuple(item.name for item in dataclasses.fields(OpdOptions) if item.name != "use_opd")
    elif options.rollout.load_debug_rollout_data is not None:
        # a baseline is part of the objective, which a recording cannot serve: that is refused wherever it stands
        of_type = {"megatron": _MEGATRON_ONLY, "sglang": _SGLANG_ONLY}.get(options.opd.opd_type or "", ())
        names = (*SELF_ONLY, *(name for name in of_type if name != "opd_baseline"), *OF_MIXTURE)
    return [name for name in names if name in options.given]


def _misplaced(options: Options, names: tuple[str, ...], other: str) -> list[str]:
    return [f"{flag_of(name)} goes with --opd-type {other} only" for name in names if name in options.given]


def _megatron_faults(options: Options) -> list[str]:
    faults = []
    if has_megatron_teacher(options) and not knows_teacher(options):
        faults.append("--opd-type megatron needs --opd-teacher-load: name the teacher's checkpoint folder")
    baseline = options.opd.opd_baseline
    if baseline != "none" and options.rollout.load_debug_rollout_data is not None:
        faults.append(f"--opd-baseline {baseline} needs the teacher itself: recorded rollouts hold its scores only")
    measured = options.opd.opd_exact_kl_interval or options.opd.opd_diagnostics_interval
    if "opd_teacher_hidden_dtype" in options.given and not needs_teacher_hidden(options) and not measured:
        faults.append(
            "--opd-teacher-hidden-dtype has no effect: --opd-exact-kl-interval 0 and --opd-baseline none keep no "
            "hidden states: leave it out"
        )
    if options.opd.opd_teacher_max_tokens_per_gpu is not None:
        if options.opd.opd_teacher_micro_batch_size is not None:
            faults.append(
                "--opd-teacher-micro-batch-size and --opd-teacher-max-tokens-per-gpu both size the teacher's "
                "micro-batches: leave out one of them"
            )
        if options.parallel.qkv_format == "bshd":
            faults.append("--opd-teacher-max-tokens-per-gpu counts packed tokens: leave out --qkv-format bshd")
    servers_only = [name for name in _SGLANG_ONLY if not (is_self_taught(options) and name in _WHERE_IT_IS_LONG)]
    return faults + _misplaced(options, tuple(servers_only), "sglang")


def _sglang_faults(options: Options) -> list[str]:
    faults = []
    opd = options.opd
    if opd.opd_teachers is not None:
        faults += [
            f"{flag_of(name)} does not go with --opd-teachers, whose file says it for each teacher: leave out one of "
            "them"
            for name in ("opd_teacher_url", "opd_teacher_api_key_env")
            if name in options.given
        ]
        faults += read_teachers(opd.opd_teachers)[1]
    else:
        engine_teaches = is_self_taught(options) and opd.opd_self_weights == "current"
        if not (opd.opd_teacher_url or engine_teaches) and options.rollout.load_debug_rollout_data is None:
            faults.append("--opd-type sglang needs --opd-teacher-url: give the address of the teacher's server")
        if "opd_teacher_route_key" in options.given:
            faults.append("--opd-teacher-route-key has no effect without --opd-teachers: leave it out")
    if opd.opd_on_teacher_failure == "stop" and opd.opd_overlong == "stop" and "opd_max_failed_frac" in options.given:
        faults.append("--opd-max-failed-frac has no effect with --opd-on-teacher-failure stop: choose mask or drop")
    return faults + _misplaced(options, _MEGATRON_ONLY, "megatron")


def _sampling_faults(options: Options) -> list[str]:
    """The rule of one temperature and one sampling law: else the mean of the term is not the KL it is meant to be."""
    rollout = options.rollout
    override = "or accept the bias with --opd-allow-sampling-mismatch"
    faults = []
    if options.opd.opd_type == "sglang" and rollout.rollout_temperature != 1.0:
        faults.append(
            f"--rollout-temperature {rollout.rollout_temperature:g} does not go with --opd-type sglang, whose scores "
            f"are at temperature 1: set it to 1, use --opd-type megatron, {override}"
        )
    if options.opd.opd_loss == "distribution":
        return faults  # which has no expectation over sampled tokens
    if rollout.rollout_top_p < 1.0:
        faults.append(
            f"--rollout-top-p {rollout.rollout_top_p:g} samples from another distribution than the one that --use-opd "
            f"compares with the teacher's: set it to 1 {override}"
        )
    if rollout.rollout_top_k != -1:
        faults.append(
            f"--rollout-top-k {rollout.rollout_top_k} samples from another distribution than the one that --use-opd "
            f"compares with the teacher's: set it to -1 {override}"
        )
    return faults
