"""Forms of the distillation term: options that need or exclude one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opd_megatron.config.flags import flag_of
from opd_megatron.config.options import OpdOptions, Options
from opd_megatron.config.resolve import needs_student_ids

_OF_FORM = {
    "sampled": ("opd_kl_discount", "opd_log_ratio_clip", "opd_importance", "opd_baseline"),
    "distribution": (
        "opd_divergence",
        "opd_divergence_to",
        "opd_divergence_mix",
        "opd_divergence_schedule",
        "opd_jsd_beta",
        "opd_jsd_beta_end",
        "opd_jsd_scaled",
        "opd_skew",
        "opd_alpha",
        "opd_support",
        "opd_top_k",
        "opd_tail",
        "opd_temperature",
        "opd_entropy_aware",
    ),
    "kl_loss": ("opd_kl_loss_type",),
}
"""Options that have an effect with one ``--opd-loss`` only."""

_OF_DIVERGENCE = {
    "opd_jsd_beta": ("jsd",),
    "opd_jsd_beta_end": ("jsd",),
    "opd_jsd_scaled": ("jsd",),
    "opd_skew": ("skew_kl", "skew_reverse_kl"),
    "opd_alpha": ("alpha",),
}


def distribution_faults(options: Options) -> list[str]:
    """Every fault of ``--opd-loss`` and what belongs to it; the options have ``--use-opd``."""
    faults = [
        f"{flag_of(name)} goes with --opd-loss {form} only"
        for form, names in _OF_FORM.items()
        if form != options.opd.opd_loss
        for name in names
        if name in options.given
    ]
    if (options.opd.opd_kl_coef_end is None) != (options.opd.opd_kl_coef_rollouts is None):
        faults.append("--opd-kl-coef-end and --opd-kl-coef-rollouts go together: give both or neither")
    if options.opd.opd_loss == "sampled":
        faults += _sampled_faults(options.opd)
    if options.opd.opd_loss == "distribution":
        faults += [*_divergence_faults(options, options.opd), *_support_faults(options, options.opd)]
    return faults


def _sampled_faults(opd: OpdOptions) -> Iterator[str]:
    if not opd.opd_importance:
        return
    if opd.opd_kl_discount > 0:
        yield "--opd-importance does not go with --opd-kl-discount: its log-ratios are those of the current weights"
    if opd.opd_baseline != "none":
        yield "--opd-importance does not go with --opd-baseline: leave out one of them"


def _divergence_faults(options: Options, opd: OpdOptions) -> Iterator[str]:
    chosen = (opd.opd_divergence, opd.opd_divergence_to)
    for name, kinds in _OF_DIVERGENCE.items():
        if name in options.given and not any(kind in chosen for kind in kinds):
            yield f"{flag_of(name)} goes with --opd-divergence {_either(kinds)} only"
    if opd.opd_divergence_to is None:
        if opd.opd_divergence_mix is not None:
            yield "--opd-divergence-mix needs --opd-divergence-to: name the second divergence"
        if opd.opd_divergence_schedule is not None and opd.opd_jsd_beta_end is None:
            yield (
                "--opd-divergence-schedule has nothing to change: name a second divergence with --opd-divergence-to, "
                "or the last beta of jsd with --opd-jsd-beta-end"
            )
    elif opd.opd_divergence_mix is None and opd.opd_divergence_schedule is None:
        yield "--opd-divergence-to needs --opd-divergence-mix, --opd-divergence-schedule or both"
    if opd.opd_divergence_to == opd.opd_divergence:
        yield f"--opd-divergence-to {opd.opd_divergence} is the first divergence again: name another, or leave it out"
    if opd.opd_divergence_mix == 0.0:
        yield "--opd-divergence-mix 0 gives --opd-divergence-to no weight: leave both out"
    if opd.opd_jsd_beta_end is not None:
        yield from _beta_faults(opd)


def _beta_faults(opd: OpdOptions) -> Iterator[str]:
    """Of a beta that changes."""
    if opd.opd_divergence_schedule is None:
        yield "--opd-jsd-beta-end needs --opd-divergence-schedule: say over which rollouts beta changes"
    if not opd.opd_jsd_scaled:
        yield (
            "--opd-jsd-beta-end needs --opd-jsd-scaled: otherwise the divergence shrinks to nothing towards beta 0 and "
            "1 and jumps there"
        )
    if opd.opd_jsd_beta_end == opd.opd_jsd_beta:
        yield f"--opd-jsd-beta-end {opd.opd_jsd_beta_end:g} is where --opd-jsd-beta begins: leave it out"


def _either(kinds: Sequence[str]) -> str:
    return " or ".join(kinds)


def _support_faults(options: Options, opd: OpdOptions) -> Iterator[str]:
    if opd.opd_support == "full":
        if opd.opd_type == "sglang":
            yield (
                "--opd-loss distribution over the whole vocabulary needs --opd-type megatron: a server gives its top "
                "tokens only, so add --opd-support teacher_topk and --opd-top-k"
            )
        elif opd.opd_top_k is not None:
            yield "--opd-top-k has no effect with --opd-support full: name teacher_topk or student_topk"
        if "opd_tail" in options.given:
            yield "--opd-tail has no effect with --opd-support full, which leaves no token out"
    elif opd.opd_top_k is None:
        yield f"--opd-support {opd.opd_support} needs --opd-top-k: say how many tokens"
    elif opd.opd_top_k == 1 and opd.opd_tail == "renormalized":
        yield "--opd-tail renormalized needs an --opd-top-k of at least 2: one token has probability 1 on both sides"
    if needs_student_ids(options):
        yield from _student_ids_faults(opd)
    if opd.opd_type == "megatron" and options.rollout.load_debug_rollout_data is not None:
        yield "--opd-loss distribution needs the Megatron teacher itself: recorded rollouts hold its scores only"
    temperature = opd.opd_temperature or options.rollout.rollout_temperature
    if opd.opd_type == "sglang" and temperature != 1.0 and opd.opd_tail != "renormalized":
        yield (
            f"--opd-temperature {temperature:g} with --opd-type sglang needs --opd-tail renormalized: the mass outside "
            "a server's top tokens is known at temperature 1 only"
        )


def _student_ids_faults(opd: OpdOptions) -> Iterator[str]:
    if opd.opd_top_k is not None and opd.opd_top_k > opd.opd_max_union_ids:
        yield (
            f"--opd-support student_topk with --opd-top-k {opd.opd_top_k} asks a server for more than "
            f"--opd-max-union-ids {opd.opd_max_union_ids} ids at every position: lower the first or raise the second"
        )
    for flag, policy in (
        ("--opd-on-teacher-failure", opd.opd_on_teacher_failure),
        ("--opd-overlong", opd.opd_overlong),
    ):
        if policy == "drop":
            yield (
                f"{flag} drop does not go with --opd-support student_topk and --opd-type sglang, which scores a "
                "rollout when it is whole: choose stop or mask"
            )
