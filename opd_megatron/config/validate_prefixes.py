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
    if has_task(options):
        yield (
            "--opd-prefix-len leaves responses unfinished, of which a task reward cannot judge: use --rm-type zero or "
            "--advantage-estimator none"
        )
