"""Bytes of each rank, predicted from the architecture, the options and the layout; no torch, no Megatron.

What is counted follows what Megatron-Core and this library allocate; ``tests/megatron/test_memory.py`` holds it against
measured allocations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from opd_megatron.config.activations import Work, activation_bytes, number_bytes, share
from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.critic import has_critic
from opd_megatron.config.head_memory import head_bytes, keeps_hidden_rows, teacher_head_bytes, teacher_number_bytes
from opd_megatron.config.options import OptimizerOptions, Options, ParallelOptions
from opd_megatron.config.parameters import Parameters, rank_parameters, total_parameters
from opd_megatron.config.resolve import (
    has_own_layout,
    knows_teacher,
    teacher_answers,
    teacher_parallel,
    teaches_itself_by_average,
    teaches_itself_now,
)
from opd_megatron.config.targets import OPD_REFERENCE, kept_reference, loads_reference, named_architectures
from opd_megatron.config.vocab_chunks import DeviceKind

MEASURED_GRADIENTS = 4
"""Gradients in float32 that ``--opd-gradient-diagnostics-interval`` holds against one another on the host."""


@dataclass(frozen=True)
class Models:
    """The models of a run; ``teacher`` is that of the trainer, of ``--opd-teacher-load`` or the student.

    ``further`` are those of ``config.targets.named_models`` by name, which run as the teacher does.
    """

    student: ModelArchitecture
    teacher: ModelArchitecture | None = None
    has_reference: bool = False
    has_critic: bool = False
    further: Mapping[str, ModelArchitecture] = dataclasses.field(default_factory=dict)

    @property
    def as_teacher(self) -> list[ModelArchitecture]:
        """Those that run in the teacher's layout and precision."""
        return [*([self.teacher] if self.teacher else []), *self.further.values()]

    def keeping_rows(self, options: Options) -> list[ModelArchitecture]:
        """Those whose hidden rows of a rollout are kept on the host."""
        reference = kept_reference(options)
        models = [model for name, model in self.further.items() if name != OPD_REFERENCE]
        models = [self.teacher, *models] if self.teacher and keeps_hidden_rows(options) else []
        return models if reference is None else [*models, self.further.get(reference, self.student)]

    @classmethod
    def of(cls, options: Options, student: ModelArchitecture, teacher: ModelArchitecture | None) -> Models:
        """``teacher`` is left out where the options give it nothing to do."""
        own = teacher if knows_teacher(options) else None
        return cls(student, own, loads_reference(options), has_critic(options), named_architectures(options))


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    ``activations`` are kept between forward and backward, ``recomputed`` those of the layers that are made again at a
    time. ``head`` are the chunked vocabulary head's buffers and gradients, ``rollout`` the local engine with its cache
    of keys and values, which only the controller's device has. ``critic`` are weights, gradients and optimizer of a
    critic, whose activations are those of the student. ``host`` is what the rank keeps in the host's memory:
    the teacher's hidden rows, its output weight where that comes from another layout, and what is offloaded. ``total``
    is the most that the device has at once; the engine counts always, since the controller's process keeps the memory
    that it has freed.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    head: int
    teacher: int
    reference: int
    critic: int
    rollout: int
    host: int
    total: int

    @property
    def device_parts(self) -> dict[str, int]:
        """What the device holds, by name."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in ("stage", "host", "total")
        }


def estimate(options: Options, models: Models, device: DeviceKind) -> RankMemory:
    """The rank that needs most; its pipeline stage is named in the result. The layout must be valid."""
    stages = range(options.parallel.pipeline_model_parallel_size)
    return max((estimate_stage(options, models, stage, device) for stage in stages), key=lambda memory: memory.total)


def estimate_stage(options: Options, models: Models, stage: int, device: DeviceKind) -> RankMemory:
    """A rank of pipeline stage ``stage``, counted from 0, of the first data-parallel group."""
    settings, student, number = options.optimizer, models.student, number_bytes(options.optimizer)
    held = _parameters(options, student, options.parallel, stage)
    is_last = stage == options.parallel.pipeline_model_parallel_size - 1
    activations, recomputed = activation_bytes(options, student, stage, device)
    critic = critic_bytes(options, models, stage)
    frozen = [_teacher_bytes(options, model, stage) for model in models.as_teacher]
    parts = {
        "weights": number * held.total,
        "gradients": gradient_number_bytes(settings) * held.total,
        "optimizer": optimizer_bytes(options, held),
        "activations": activations,
        "recomputed": recomputed,
        "head": head_bytes(options, student, models.keeping_rows(options), device) if is_last else 0,
        "teacher": sum(frozen),
        "reference": number * held.total if models.has_reference else 0,
        "critic": sum(critic),
        "rollout": rollout_bytes(options, student, models.teacher) if stage == 0 else 0,
    }
    host = sum(parts[name] for name in _kept_on_host(options)) + _critic_on_host(options, *critic)
    for model in models.keeping_rows(options) if is_last else []:
        rows = Work.of(options, student).rollout_rows
        host += rows * model.hidden_size * teacher_number_bytes(options, hidden=True)
        host += teacher_head_bytes(options, model) if has_own_layout(options) or teaches_itself_now(options) else 0
    if options.opd.opd_gradient_diagnostics_interval:
        host += MEASURED_GRADIENTS * 4 * _counted_in_norm(options, held)
    total = _most_at_once(options, parts, max([*frozen, parts["reference"]]), *critic)
    return RankMemory(stage=stage, host=host, total=total, **parts)


def _most_at_once(options: Options, parts: Mapping[str, int], largest: int, critic: int, critic_state: int) -> int:
    """The largest of the phases: a model's passes, its optimizer's step, and scoring by a frozen model.

    ``largest`` is what the largest frozen model takes.
    ``critic`` are the bytes of its weights and gradients, ``critic_state`` those of its optimizer.
    """
    offload = options.offload
    frozen = parts["teacher"] + parts["reference"]
    standing = 0 if offload.offload_teacher else frozen
    layers = parts["activations"] + parts["recomputed"]
    scoring = largest if offload.offload_teacher else frozen

    def at_rest(trained: int, state: int) -> int:
        if offload.offload_train:
            return 0
        return trained + (0 if offload.offload_optimizer else state)

    def at_work(trained: int, state: int, working: int) -> int:
        passes = working + (0 if offload.offload_optimizer else state)
        return trained + max(passes, state)

    student = (parts["weights"] + parts["gradients"], parts["optimizer"])
    phases = [
        at_work(*student, layers + parts["head"]) + at_rest(critic, critic_state) + standing,
        scoring + at_rest(*student) + at_rest(critic, critic_state),
    ]
    if critic:
        phases.append(at_work(critic, critic_state, layers) + at_rest(*student) + standing)
    return parts["rollout"] + max(phases)


def critic_bytes(options: Options, models: Models, stage: int) -> tuple[int, int]:
    """A critic's weights and gradients, and its optimizer."""
    if not models.has_critic:
        return 0, 0
    settings = options.optimizer
    held = _parameters(options, models.student, options.parallel, stage, is_critic=True)
    return (number_bytes(settings) + gradient_number_bytes(settings)) * held.total, optimizer_bytes(options, held)


def _critic_on_host(options: Options, trained: int, state: int) -> int:
    """What has room on the host of a critic that leaves; gradients need none."""
    number, settings = number_bytes(options.optimizer), options.optimizer
    weights = trained * number // (number + gradient_number_bytes(settings))
    offload = options.offload
    kept = state if offload.offload_optimizer or offload.offload_train else 0
    return kept + (weights if offload.offload_train else 0)


def _kept_on_host(options: Options) -> set[str]:
    """Parts that have room on the host; gradients are made anew and need none."""
    offload = options.offload
    teacher = {"teacher", "reference"} if offload.offload_teacher else set()
    optimizer = {"optimizer"} if offload.offload_optimizer or offload.offload_train else set()
    return teacher | optimizer | ({"weights"} if offload.offload_train else set())


def _teacher_bytes(options: Options, model: ModelArchitecture, stage: int) -> int:
    """Weights of a teacher in its own layout and precision; of its largest stage where its pipeline is another.

    A student that is its own teacher has none but its own, or those of the average, which is in float32.
    """
    if teaches_itself_now(options):
        return 0
    parallel = teacher_parallel(options, model)
    pipeline = parallel.pipeline_model_parallel_size
    stages = [stage] if pipeline == options.parallel.pipeline_model_parallel_size else range(pipeline)
    number = teacher_number_bytes(options)
    number += 4 if teaches_itself_by_average(options) and number < 4 else 0
    return number * max(_parameters(options, model, parallel, one).total for one in stages)


def _parameters(
    options: Options, model: ModelArchitecture, parallel: ParallelOptions, stage: int, *, is_critic: bool = False
) -> Parameters:
    divisible_by = options.model.make_vocab_size_divisible_by
    return rank_parameters(model, parallel, stage, vocab_divisible_by=divisible_by, is_critic=is_critic)


def gradient_number_bytes(settings: OptimizerOptions) -> int:
    return 2 if settings.bf16 and not settings.accumulate_allreduce_grads_in_fp32 else 4


def _counted_in_norm(options: Options, held: Parameters) -> int:
    """Numbers of the gradient that this rank's optimizer has."""
    if not options.optimizer.use_distributed_optimizer:
        return held.total
    return share(held.dense, dense_copies(options)) + share(held.experts, expert_copies(options))


def optimizer_bytes(options: Options, held: Parameters) -> int:
    """Moments, and with ``--bf16`` main weights and, unless gradients are in float32 already, main gradients.

    With ``--use-distributed-optimizer`` the ranks that hold the same weights share it out.
    """
    settings = options.optimizer
    numbers = 2 if settings.optimizer == "adam" else int(settings.sgd_momentum > 0)
    if settings.bf16:
        numbers += 1 + int(gradient_number_bytes(settings) < 4)
    return 4 * numbers * _counted_in_norm(options, held)


def dense_copies(options: Options) -> int:
    """Ranks that hold the same weights."""
    return options.data_parallel_size * options.parallel.context_parallel_size


def expert_copies(options: Options) -> int:
    """Ranks that hold the same experts."""
    parallel = options.parallel
    if parallel.expert_model_parallel_size == 1:
        return dense_copies(options)
    holders = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    return options.world_size // (holders * parallel.pipeline_model_parallel_size)


def rollout_bytes(options: Options, student: ModelArchitecture, teacher: ModelArchitecture | None = None) -> int:
    """The local engines: the student's, and that of a Megatron teacher that answers in its place."""
    number = number_bytes(options.optimizer)
    samples = options.objective.loss_type == "policy_loss" and options.rollout.load_debug_rollout_data is None
    total = 0
    if options.engine.rollout_engine == "local" and (samples or options.evaluation.eval_prompt_data):
        total += _engine_bytes(options, student, number)
    if teacher is not None and teacher_answers(options):
        total += _engine_bytes(options, teacher, teacher_number_bytes(options))
    return total


def _engine_bytes(options: Options, model: ModelArchitecture, number: int) -> int:
    """Weights, keys and values of the sequences decoded together, their logits."""
    rollout = options.rollout
    known = options.samples_per_rollout if rollout.rollout_batch_size else rollout.rollout_engine_batch_size
    sequences = min(rollout.rollout_engine_batch_size, known)
    position = 2 * model.num_layers * model.num_query_groups * model.kv_channels
    cache = sequences * Work.of(options, model).sample * position
    return number * (total_parameters(model) + cache) + sequences * model.vocab_size * (number + 8)
