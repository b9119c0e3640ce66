"""Where the prefixes come from at which student and teacher are compared."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class PrefixOptions:
    """Prefixes of the distillation term"""

    opd_prefix_len: int | None = option(
        None,
        "sample, and train on, no more than the first so many tokens of each response; evaluation goes on to the end",
        unit="tokens",
        minimum=1,
    )
