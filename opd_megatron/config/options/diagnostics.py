"""How often a run looks closer at its distillation than every step can afford."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option


@dataclass(frozen=True)
class DiagnosticsOptions:
    """Diagnostics of the distillation"""

    opd_diagnostics_interval: int = option(
        0,
        "measure divergences, entropies, shared mass and where the KL lies this often, by a forward pass before the "
        "step, one more unless old log-probabilities or chosen tokens need it as well (0: never)",
        unit="rollouts",
        minimum=0,
    )
    opd_diagnostics_top_k: int = option(
        8, "most probable tokens of student and teacher that are compared", minimum=1, maximum=65536
    )
    opd_gradient_diagnostics_interval: int = option(
        0,
        "measure the shares of teacher and task in the gradient and its noise this often, by two more backward passes "
        "(0: never)",
        unit="rollouts",
        minimum=0,
    )
