"""What the ranks do in the tests of targets that several frozen models make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.trainer import MegatronTrainer
from tests.megatron.support import GRADIENT_FLAGS, make_samples, make_spec, step_gradients
from tests.parallel.work import hear_teacher

TARGETS: dict[str, dict[str, Any]] = {
    "geometric, extrapolated": {"opd_teacher_mixture": "geometric", "opd_reward_scale": 1.5},
    "geometric with prompts": {"opd_teacher_mixture": "geometric", "opd_include_prompt": True},
    "arithmetic": {"opd_teacher_mixture": "arithmetic", "opd_teacher_weights": (1.0, 2.0), "opd_divergence": "jsd"},
}


def gradients(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], target: str, models: Mapping[str, Path]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of a step by whole distributions, with two teachers and the student's start."""
    settings = {
        **GRADIENT_FLAGS,
        **flags,
        **TARGETS[target],
        "use_opd": True,
        "opd_type": "megatron",
        "opd_loss": "distribution",
        "opd_more_teachers": (str(models["second"]),),
    }
    spec = make_spec(
        folder, teacher=models["teacher"], reference=folder, further={"teacher_2": models["second"]}, **settings
    )
    trainer, samples = MegatronTrainer(spec, rendezvous), make_samples(1)
    for name in ("teacher", "teacher_2", "reference"):
        hear_teacher(trainer, samples, name)
    return step_gradients(trainer, samples)
