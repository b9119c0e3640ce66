"""Refusals of the options that ask for diagnostics."""

from __future__ import annotations

from opd_megatron.config.options import Options


def diagnostics_faults(options: Options) -> list[str]:
    """Settings of diagnostics that nobody measures."""
    if "opd_diagnostics_top_k" in options.typed and not options.opd.opd_diagnostics_interval:
        return ["--opd-diagnostics-top-k has no effect without --opd-diagnostics-interval: add it"]
    if "opd_diagnostics_top_k" in options.typed and options.opd.opd_type == "sglang":
        return ["--opd-diagnostics-top-k has no effect with --opd-type sglang: a server's tokens are --opd-top-k"]
    return []
