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
    opd_student_data_fraction: float = option(
        1.0,
        "share of the prompts that the student answers; the others' responses come from --opd-data-source",
        minimum=0.0,
        maximum=1.0,
    )
    opd_data_source: str = option(
        "data",
        "where the responses come from that the student does not make: data, the field --opd-data-response-key of the "
        "prompts' rows; teacher, sampled by the teacher as the student samples",
        choices=("data", "teacher"),
    )
    opd_data_response_key: str | None = option(
        None, "field of a prompt's row, or of its metadata, that holds a response", metavar="NAME"
    )
    opd_data_loss: str | None = option(
        None,
        "what the responses teach that the student does not make: distribution, the divergence of --opd-loss "
        "distribution at their prefixes; supervised, the cross-entropy of their tokens (default: distribution with "
        "--opd-loss distribution, else supervised)",
        choices=("distribution", "supervised"),
    )
