"""What every model in training does in an optimizer step, be it the student or its critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from opd_megatron.config.errors import RunError
from opd_megatron.config.options import Options
from opd_megatron.megatron.optimizer import optimizer_step
from opd_megatron.objectives.weights import step_weights
from opd_megatron.sample import Sample


def step_loss_weights(options: Options, samples: Sequence[Sample], number: int) -> list[np.ndarray]:
    """Weights of the tokens of optimizer step ``number`` of a rollout.

    One ``[T]`` float32 array per sample by its place; those before the step are empty.
    """
    first = number * options.global_batch_size
    masks = [sample.loss_mask for sample in samples[first : first + options.global_batch_size]]
    weights = step_weights(options.objective, masks)
    return [np.zeros(0, dtype=np.float32)] * first + [weight.numpy() for weight in weights]


def apply_gradients(
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    holding: AbstractContextManager[None],
    forget_copies: bool,
    rate_flag: str,
) -> tuple[float, float]:
    """Take one step with the gradients that are there; their global norm before clipping, and the learning rate.

    ``holding`` has the optimizer's state on the device. ``forget_copies`` drops gradients of master weights, which
    would stay behind when that state leaves. Raises ``RunError`` if the norm is not finite, and names ``rate_flag``.
    """
    rate = optimizer.param_groups[0]["lr"]
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
    return norm, rate


def sum_over_data_parallel(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up statistics over the data- and context-parallel ranks; every rank has the same names."""
    names = sorted(statistics)
    table = torch.stack([statistics[name] for name in names])
    dist.all_reduce(table, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return dict(zip(names, table, strict=True))


def mean_over_steps(per_step: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over optimizer steps that all have it."""
    return {name: float(np.mean([metrics[name] for metrics in per_step])) for name in per_step[0]}
