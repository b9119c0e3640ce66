"""What the distillation term compares the student with, where it is not simply one teacher."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class TargetOptions:
    """Target of distillation"""

    opd_reward_scale: float = option(
        1.0,
        "compare with teacher^L * reference^(1 - L) in place of the teacher (1: the teacher; above: extrapolated "
        "beyond it, away from the reference)",
        metavar="L",
        above=0.0,
        maximum=100.0,
    )
    opd_ref_load: str | None = option(
        None,
        "reference of --opd-reward-scale: a torch_dist or Hugging Face folder (default: --ref-load, else "
        "--hf-checkpoint)",
        metavar="DIR",
    )
    opd_include_prompt: bool = option(
        False, "compare whole distributions at the tokens of the prompt, too (Megatron teacher)"
    )
    opd_more_teachers: tuple[str, ...] = option(
        (),
        "further Megatron teachers, mixed with --opd-teacher-load: torch_dist or Hugging Face folders",
        metavar="DIR",
    )
    opd_teacher_mixture: str | None = option(
        None,
        "what several teachers say together: arithmetic, the weighted mean of their distributions; geometric, that of "
        "their log-probabilities (with --opd-teachers in place of a route for each prompt)",
        choices=("arithmetic", "geometric"),
    )
    opd_teacher_weights: tuple[float, ...] = option(
        (),
        "weights of --opd-teacher-mixture in the order of the teachers, divided by their sum (default: equal)",
        metavar="W",
        above=0.0,
    )
