"""Self-distillation: the student is its own teacher and sees more than the student does."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config import checks
from opd_megatron.config.declare import option


@dataclass(frozen=True)
class SelfTeacherOptions:
    """The student as its own teacher"""

    opd_teacher: str = option(
        "external",
        "whose distributions are the goal: external, another model's; self, the student's own, given a privileged "
        "prompt before the same response",
        choices=("external", "self"),
    )
    opd_self_weights: str = option(
        "frozen",
        "weights of --opd-teacher self: frozen, those of the start (--ref-load, else --hf-checkpoint); ema, a moving "
        "average of the student's; current, those that sampled the rollout",
        choices=("frozen", "ema", "current"),
    )
    opd_self_ema_decay: float = option(
        0.99, "what --opd-self-weights ema keeps of itself after each rollout", minimum=0.0, below=1.0
    )
    opd_self_context_key: str | None = option(
        None,
        "field of the row, or else of its metadata, with the text that --opd-teacher self sees and the student does "
        "not",
        metavar="NAME",
    )
    opd_self_feedback: bool = option(
        False,
        "the text of --opd-self-context-key is feedback: what the sample's metadata holds when it has its reward. "
        "Samples without any are left out of the distillation term",
    )
    opd_self_template: str = option(
        "{context}\n{prompt}",
        "prompt of --opd-teacher self; {prompt} is the student's, {context} the text of --opd-self-context-key",
        metavar="TEXT",
        check=checks.prompt_template,
    )
