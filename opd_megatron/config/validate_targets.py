"""What the student is compared with: options that need or exclude one another."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.options import Options
from opd_megatron.config.targets import extrapolates


def target_faults(options: Options) -> Iterator[str]:
    """Every fault of the target's options; the options have ``--use-opd``."""
    opd = options.opd
    if not extrapolates(options):
        if opd.opd_ref_load is not None and "opd_ref_load" in options.given:
            yield "--opd-ref-load has no effect with --opd-reward-scale 1, which is the teacher: leave it out"
        return
    scale = f"--opd-reward-scale {opd.opd_reward_scale:g}"
    if opd.opd_loss == "distribution" and (opd.opd_support != "full" or opd.opd_type == "sglang"):
        yield (
            f"{scale} with --opd-loss distribution needs --opd-support full and --opd-type megatron: extrapolating the "
            "classes of a top-k record does not give the record of the extrapolated distribution"
        )
    if opd.opd_baseline != "none":
        yield f"{scale} does not go with --opd-baseline, the mean of the plain log-ratio: leave out one of them"
    if opd.opd_entropy_aware > 0:
        yield f"{scale} does not go with --opd-entropy-aware, which weighs by the teacher itself: leave out one of them"
