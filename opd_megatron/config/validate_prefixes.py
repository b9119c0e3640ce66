"""Combinations of options that choose the prefixes of the distillation term."""

from __future__ import annotations

from collections.abc import Iterator

from opd_megatron.config.options import Options
from opd_megatron.config.resolve import has_task


def prefix_faults(options: Options) -> Iterator[str]:
    """Every fault of ``--opd-prefix-len``; the options have ``--use-opd``."""
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
        yield (
            "--opd-prefix-len leaves responses unfinished, of which a task reward cannot judge: use --rm-type zero or "
            "--advantage-estimator none"
        )
