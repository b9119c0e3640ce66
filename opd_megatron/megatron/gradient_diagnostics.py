"""How much of the gradient of an optimizer step the teacher and the task make, and how much of it is noise.

Two backward passes over the step's samples, each in two halves, give four gradients: of the task (everything without
the distillation term) and of the distillation term, from either half of the prompts. Each is brought to the host as
this rank's part of what the gradient norm counts, so no parameter counts twice in any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from opd_megatron.megatron import cpu
from opd_megatron.megatron.forward import run_micro_batches
from opd_megatron.megatron.loss_inputs import StepLoss
from opd_megatron.megatron.moe import unbalanced
from opd_megatron.objectives.gradients import gradient_statistics
from opd_megatron.sample import Sample

Gradient = list[list[Tensor]]
"""Float32 parts on the host, a list for each of the chained optimizers."""


def gradient_diagnostics(
    wrapped: Sequence[Any],
    optimizer: MegatronOptimizer,
    loss: StepLoss,
    micro_batches: Sequence[tuple[int, ...]],
) -> dict[str, float]:
    """The metrics of :func:`~opd_megatron.objectives.gradients.gradient_statistics` for one optimizer step.

    ``loss`` is that of the step and ``micro_batches`` are this rank's. Weights and optimizer stay as they are, the
    gradients are left at zero. Under the weights that sampled, where every importance ratio is 1, the two parts add up
    to the gradient of the step but for auxiliary losses of experts, which are left out. All ranks call it.
    """
    halves = prompt_halves(loss.samples[: len(loss.loss_weights)])
    gradients: list[Gradient] = []
    with unbalanced([chunk.module for chunk in wrapped]):
        for part in (without_teacher(loss), without_task(loss)):
            for half in halves:
                # as many micro-batches as before, for the ranks move in step; some may be empty
                chosen = [tuple(place for place in places if place in half) for places in micro_batches]
                gradients.append(_gradient(wrapped, optimizer, part, chosen))
    _zero(wrapped, optimizer)
    return gradient_statistics(_products(gradients, optimizer))


def prompt_halves(samples: Sequence[Sample]) -> tuple[set[int], set[int]]:
    """Places of the samples of every other prompt, and of the rest; of one prompt every other sample."""
    groups = {group: number for number, group in enumerate(dict.fromkeys(s.group_index for s in samples))}
    numbers = [groups[sample.group_index] for sample in samples] if len(groups) > 1 else range(len(samples))
    first = {place for place, number in enumerate(numbers) if number % 2 == 0}
    return first, set(range(len(samples))) - first


def without_teacher(loss: StepLoss) -> StepLoss:
    """The same loss with coefficient 0 before the distillation term."""
    opd = replace(loss.options.opd, opd_kl_coef=0.0, opd_kl_coef_end=None, opd_kl_coef_rollouts=None)
    return replace(loss, options=replace(loss.options, opd=opd))


def without_task(loss: StepLoss) -> StepLoss:
    """The distillation term alone: no task advantage, no KL to a reference, no entropy bonus."""
    objective = replace(loss.options.objective, use_kl_loss=False, entropy_coef=0.0)
    samples = [replace(sample, advantages=np.zeros_like(sample.advantages)) for sample in loss.samples]
    return replace(loss, options=replace(loss.options, objective=objective), samples=samples)


def _zero(wrapped: Sequence[Any], optimizer: MegatronOptimizer) -> None:
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def _gradient(
    wrapped: Sequence[Any], optimizer: MegatronOptimizer, loss: StepLoss, micro_batches: Sequence[tuple[int, ...]]
) -> Gradient:
    _zero(wrapped, optimizer)
    run_micro_batches(wrapped, loss.student, loss.samples, micro_batches, loss, with_gradients=True)
    with cpu.cuda_type_names():
        optimizer.prepare_grads()
    return [
        [gradient.detach().to("cpu", torch.float32, copy=True) for gradient in part.get_main_grads_for_grad_norm()]
        for part in _parts(optimizer)
    ]


def _parts(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    """The chained optimizers, of dense weights and of experts, or the only one."""
    chained: Sequence[MegatronOptimizer] = getattr(optimizer, "chained_optimizers", [optimizer])
    return chained


def _products(gradients: Sequence[Gradient], optimizer: MegatronOptimizer) -> Tensor:
    """``[4, 4]`` float64 scalar products of the whole gradients, the same on every rank."""
    count = len(gradients)
    total = torch.zeros(count, count, dtype=torch.float64)
    for number, part in enumerate(_parts(optimizer)):
        own = torch.zeros(count, count, dtype=torch.float64)
        for tensors in zip(*(gradient[number] for gradient in gradients), strict=True):
            flat = torch.stack([tensor.flatten() for tensor in tensors]).double()
            own += flat @ flat.t()
        own = own.to(cpu.device())
        dist.all_reduce(own, group=part.get_grad_stats_parallel_group())
        total += own.cpu()
    return total
