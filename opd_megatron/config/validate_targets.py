"""What the student is compared with: options that need or exclude one another."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.options import OpdOptions, Options
from opd_megatron.config.targets import extrapolates
from opd_megatron.config.teachers_file import read_teachers

OF_MIXTURE = ("opd_teacher_mixture", "opd_teacher_weights")
"""Options of a mixture of teachers of either type."""


def target_faults(options: Options) -> Iterator[str]:
    """Every fault of the target's options; the options have ``--use-opd``."""
    opd = options.opd
    if extrapolates(options):
        scale = f"--opd-reward-scale {opd.opd_reward_scale:g}"
        yield from _distribution_faults(opd, scale, "extrapolating")
        if opd.opd_baseline != "none":
            yield f"{scale} does not go with --opd-baseline, the mean of the plain log-ratio: leave out one of them"
    elif "opd_ref_load" in options.given:
        yield "--opd-ref-load has no effect with --opd-reward-scale 1, which is the teacher: leave it out"
    if options.rollout.load_debug_rollout_data is None:
        yield from _mixture_faults(options, opd)


def _mixture_faults(options: Options, opd: OpdOptions) -> Iterator[str]:
    if opd.opd_teacher_mixture is None:
        if opd.opd_more_teachers:
            yield "--opd-more-teachers needs --opd-teacher-mixture: choose arithmetic or geometric"
        if opd.opd_teacher_weights:
            yield "--opd-teacher-weights has no effect without --opd-teacher-mixture: add it"
        return
    mixture, count = f"--opd-teacher-mixture {opd.opd_teacher_mixture}", 1 + len(opd.opd_more_teachers)
    if opd.opd_type == "sglang":
        count = len(read_teachers(opd.opd_teachers)[0]) if opd.opd_teachers is not None else 1
        if "opd_teacher_route_key" in options.given:
            yield f"--opd-teacher-route-key has no effect with {mixture}, which asks every teacher: leave it out"
    if count < 2:
        source = "--opd-more-teachers" if opd.opd_type == "megatron" else "an --opd-teachers file of several"
        yield f"{mixture} has a single teacher: add {source}"
    elif opd.opd_teacher_weights and len(opd.opd_teacher_weights) != count:
        yield f"--opd-teacher-weights names {len(opd.opd_teacher_weights)} weights for {count} teachers"
    yield from _distribution_faults(opd, mixture, "mixing")
    if opd.opd_baseline != "none" and opd.opd_teacher_mixture == "geometric":
        yield (
            f"{mixture} does not go with --opd-baseline: the normaliser that the sampled tokens' mixture lacks is part "
            "of its mean; use arithmetic, or leave it out"
        )


def _distribution_faults(opd: OpdOptions, flag: str, doing: str) -> Iterator[str]:
    if opd.opd_loss == "distribution" and (opd.opd_support != "full" or opd.opd_type == "sglang"):
        yield (
            f"{flag} with --opd-loss distribution needs --opd-support full and --opd-type megatron: {doing} the "
            "classes of top-k records does not give those of the target"
        )
    if opd.opd_entropy_aware > 0:
        yield f"{flag} does not go with --opd-entropy-aware, which weighs by one teacher: leave out one of them"
