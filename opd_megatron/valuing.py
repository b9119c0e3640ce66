"""What a critic says of the samples of a rollout, and what it is to learn from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_megatron.config.options import ObjectiveOptions
from opd_megatron.objectives.advantages import chosen_estimator, critic_targets
from opd_megatron.objectives.tensors import TokenArray
from opd_megatron.objectives.values import value_statistics
from opd_megatron.questions import Respondent, Values
from opd_megatron.sample import Sample


def add_values(
    trainer: Respondent,
    objective: ObjectiveOptions,
    samples: Sequence[Sample],
    kls: Sequence[TokenArray] | None,
) -> list[np.ndarray] | None:
    """Give the samples their values and returns; the values, or None where the estimator asks for none.

    ``kls`` are those of ``--kl-coef``. Scores of a teacher are not looked at.
    """
    if not chosen_estimator(objective).needs_values:
        return None
    values = trainer.ask(Values(), samples)
    rewards, masks = [float(sample.reward or 0.0) for sample in samples], [sample.loss_mask for sample in samples]
    targets = critic_targets(objective, rewards, masks, values, kls)
    for sample, values_T, returns_T in zip(samples, values, targets, strict=True):
        sample.values, sample.returns = values_T, returns_T.numpy()
    return values


def value_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """What was expected of a rollout and what came; {} without a critic."""
    judged = [
        (sample.values, sample.returns, sample.loss_mask)
        for sample in samples
        if sample.values is not None and sample.returns is not None
    ]
    return value_statistics(*zip(*judged, strict=True)) if judged else {}
