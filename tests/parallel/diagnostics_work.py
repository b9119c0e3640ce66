"""What the ranks do in the layout tests of the diagnostics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from opd_megatron.megatron.distributed import Rendezvous
from opd_megatron.megatron.trainer import MegatronTrainer
from opd_megatron.questions import StudentTokens
from tests.megatron.support import make_samples, make_spec
from tests.parallel.work import hear_teacher

SETTINGS: dict[str, Any] = {
    "use_opd": True,
    "opd_kl_coef": 0.3,
    "entropy_coef": 0.05,
    "rollout_temperature": 0.8,
    "opd_diagnostics_top_k": 5,
    "clip_grad": 1.0,
}


def diagnostics(
    rendezvous: Rendezvous, folder: Path, flags: dict[str, Any], teacher: Path
) -> tuple[dict[int, dict[str, np.ndarray]], dict[str, float], dict[str, float]]:
    """What was measured at each token and of the gradient before a step, and the metrics of the step after it."""
    trainer = MegatronTrainer(make_spec(folder, teacher=teacher, **SETTINGS, **flags), rendezvous)
    samples = make_samples(0)
    hear_teacher(trainer, samples)
    tokens = trainer.ask(StudentTokens(diagnostics=True), samples)
    gradient = trainer.gradient_diagnostics(samples, 0)
    plain = {place: {name: array[name] for name in array.dtype.names or ()} for place, array in tokens.items()}
    return plain, gradient, trainer.train(samples).metrics or {}
