"""A layout for a number of devices: the smallest model-parallel size at which everything fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.errors import UserError
from opd_megatron.config.memory import Models, RankMemory, estimate
from opd_megatron.config.options import Options
from opd_megatron.config.validate_run import layout_faults_of_model, run_faults
from opd_megatron.config.vocab_chunks import DeviceKind


@dataclass(frozen=True)
class Candidate:
    """A layout (with the options that it was tried with) and the rank that needs most in it."""

    options: Options
    memory: RankMemory
    fits: bool


def tried_layouts(options: Options, models: Models, *, device: DeviceKind, usable: int) -> list[Candidate]:
    """Layouts of ``options.world_size`` ranks in the order in which they are preferred, up to the first that fits.

    ``usable`` are bytes per device. Fewest ranks per copy of the model first; among equals, tensor parallelism before
    context parallelism before pipelines; then the fewest ranks that share the experts. Tensor parallelism stays within
    a node and always comes with sequence parallelism; experts that are spread are not split. All other options are as
    they are given. Raises :class:`UserError` if no layout is valid.
    """
    tried: list[Candidate] = []
    faults: list[str] = []
    for candidate in _layouts(options, models):
        found = layout_and_run_faults(candidate, models)
        if found:
            faults = faults or found
            continue
        memory = estimate(candidate, models, device)
        tried.append(Candidate(candidate, memory, memory.total <= usable))
        if tried[-1].fits:
            break
    if not tried:
        raise UserError("; ".join(dict.fromkeys(faults)))
    return tried


def layout_and_run_faults(options: Options, models: Models) -> list[str]:
    """What ``train.py`` would refuse of the run as a whole, with a student that need not be in a folder."""
    return run_faults(options) + layout_faults_of_model(options, models.student)


def _layouts(options: Options, models: Models) -> Iterator[Options]:
    """Every layout of powers of two, in the order of preference."""
    ranks, per_node = options.world_size, options.cluster.actor_num_gpus_per_node
    sizes = _powers_of_two(ranks)
    layouts = [
        (tensor, context, pipeline, experts)
        for tensor in _powers_of_two(per_node)
        for context in (sizes if options.parallel.qkv_format == "thd" else [1])
        for pipeline in sizes
        for experts in (sizes if any(model.mixture for model in _all(models)) else [1])
        if ranks % (tensor * context * pipeline) == 0
    ]

    def preference(layout: tuple[int, int, int, int]) -> tuple[int, ...]:
        tensor, context, pipeline, experts = layout
        return tensor * context * pipeline, pipeline, context, experts

    for tensor, context, pipeline, experts in sorted(layouts, key=preference):
        parallel = dataclasses.replace(
            options.parallel,
            tensor_model_parallel_size=tensor,
            sequence_parallel=tensor > 1,
            context_parallel_size=context,
            pipeline_model_parallel_size=pipeline,
            expert_model_parallel_size=experts,
            expert_tensor_parallel_size=1 if experts > 1 else None,
        )
        yield dataclasses.replace(options, parallel=parallel)


def _all(models: Models) -> list[ModelArchitecture]:
    return [models.student, *models.as_teacher]


def _powers_of_two(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length())]
