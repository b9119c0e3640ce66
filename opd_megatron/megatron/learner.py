"""What every model in training does in an optimizer step, be it the student or its critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.config.options import Options
from opd_megatron.megatron.optimizer import gradients_are_zero, optimizer_step
from opd_megatron.objectives.weights import step_weights
from opd_megatron.sample import Sample

SKIPPED_STEPS = "train/skipped_steps"
"""Optimizer steps that were not taken, since there was no gradient; of one step 0 or 1."""


def step_loss_weights(options: Options, samples: Sequence[Sample], number: int) -> list[np.ndarray]:
    """Weights of the tokens of optimizer step ``number`` of a rollout.

    One ``[T]`` float32 array per sample by its place; those before the step are empty.
    """
    first = number * options.global_batch_size
    masks = [sample.loss_mask for sample in samples[first : first + options.global_batch_size]]
    weights = step_weights(options.objective, masks)
    return [np.zeros(0, dtype=np.float32)] * first + [weight.numpy() for weight in weights]


def apply_gradients(
    wrapped: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    holding: AbstractContextManager[None],
    forget_copies: bool,
    rate_flag: str,
) -> tuple[float, float, bool]:
    """Take one step with the gradients that are there.

    Returns their global norm before clipping, the learning rate, and whether the step was taken: where the gradient is
    0 everywhere nothing was to be learned, and the weights stay, which momentum and weight decay would move on. The
    schedule counts the step in any case.

    ``holding`` has the optimizer's state on the device. ``forget_copies`` drops gradients of master weights, which
    would stay behind when that state leaves. Raises ``RunError`` if the norm is not finite, and names ``rate_flag``.
    """
    rate, norm = optimizer.param_groups[0]["lr"], 0.0
    taken = not gradients_are_zero(wrapped)
    if taken:
        with holding:
            norm = optimizer_step(optimizer)
            if forget_copies:
                optimizer.zero_grad()
    if not math.isfinite(norm):
        raise RunError(
            f"the gradient norm is {norm}; nothing was saved since the last checkpoint. "
            f"Lower {rate_flag}, or see docs/troubleshooting.md"
        )
    scheduler.step(increment=1)
    return norm, rate, taken


def sum_over_data_parallel(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up statistics over the data- and context-parallel ranks; every rank has the same names."""
    names = sorted(statistics)
    table = torch.stack([statistics[name] for name in names])
    dist.all_reduce(table, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return dict(zip(names, table, strict=True))


def of_rollout(per_step: Sequence[dict[str, float]], with_tokens: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a rollout: steps that were not taken are counted, all else are means.

    They are over the steps that had a token to train on, where there is one: the others have no mean over tokens.
    """
    skipped = sum(metrics[SKIPPED_STEPS] for metrics in per_step)
    return mean_over_steps(with_tokens or per_step) | {SKIPPED_STEPS: skipped}


def mean_over_steps(per_step: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over optimizer steps that all have it."""
    return {name: float(np.mean([metrics[name] for metrics in per_step])) for name in per_step[0]}
