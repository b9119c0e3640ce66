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
from opd_megatron.config.options import OptimizerOptions, Options, ParallelOptions
from opd_megatron.config.parameters import Parameters, rank_parameters, total_parameters
from opd_megatron.config.resolve import (
    has_megatron_teacher,
    has_own_layout,
    knows_teacher,
    needs_reference,
    needs_teacher_hidden,
    teacher_parallel,
    teaches_itself_by_average,
    teaches_itself_now,
)
from opd_megatron.config.vocab_chunks import (
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    LEAST_CHUNK_TOKENS,
    DeviceKind,
    tokens_of_chunk,
)

STATISTICS_BYTES = 64
"""Bytes per response token of ids, log-probabilities, weights and the like on the device."""


@dataclass(frozen=True)
class Models:
    """The models of a run; ``teacher`` is that of the trainer, of ``--opd-teacher-load`` or the student."""

    student: ModelArchitecture
    teacher: ModelArchitecture | None = None
    has_reference: bool = False

    @classmethod
    def of(cls, options: Options, student: ModelArchitecture, teacher: ModelArchitecture | None) -> Models:
        """``teacher`` is left out where the options give it nothing to do."""
        return cls(student, teacher if knows_teacher(options) else None, needs_reference(options))


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    ``activations`` are kept between forward and backward, ``recomputed`` those of the layers that are made again at a
    time. ``head`` are the chunked vocabulary head's buffers and gradients, ``rollout`` the local engine with its cache
    of keys and values, which only the controller's device has. ``host`` is what the rank keeps in the host's memory:
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
    parts = {
        "weights": number * held.total,
        "gradients": gradient_number_bytes(settings) * held.total,
        "optimizer": optimizer_bytes(options, held),
        "activations": activations,
        "recomputed": recomputed,
        "head": head_bytes(options, models, device) if is_last else 0,
        "teacher": _teacher_bytes(options, models, stage),
        "reference": number * held.total if models.has_reference else 0,
        "rollout": rollout_bytes(options, student) if stage == 0 else 0,
    }
    host = sum(parts[name] for name in _kept_on_host(options))
    if models.teacher is not None and keeps_hidden_rows(options) and is_last:
        rows = Work.of(options, student).rollout_rows
        host += rows * models.teacher.hidden_size * teacher_number_bytes(options, hidden=True)
        copied = has_own_layout(options) or teaches_itself_now(options)
        host += teacher_head_bytes(options, models.teacher) if copied else 0
    return RankMemory(stage=stage, host=host, total=_most_at_once(options, parts), **parts)


def _most_at_once(options: Options, parts: Mapping[str, int]) -> int:
    """The largest of the phases: forward and backward, the optimizer's step, and scoring by a frozen model."""
    offload = options.offload
    frozen = parts["teacher"] + parts["reference"]
    standing = 0 if offload.offload_teacher else frozen
    trained, state = parts["weights"] + parts["gradients"], parts["optimizer"]
    working = parts["activations"] + parts["recomputed"] + parts["head"]
    passes = trained + working + standing + (0 if offload.offload_optimizer else state)
    step = trained + state + standing
    scoring = max(parts["teacher"], parts["reference"]) if offload.offload_teacher else frozen
    if not offload.offload_train:
        scoring += trained + (0 if offload.offload_optimizer else state)
    return parts["rollout"] + max(passes, step, scoring)


def _kept_on_host(options: Options) -> set[str]:
    """Parts that have room on the host; gradients are made anew and need none."""
    offload = options.offload
    teacher = {"teacher", "reference"} if offload.offload_teacher else set()
    optimizer = {"optimizer"} if offload.offload_optimizer or offload.offload_train else set()
    return teacher | optimizer | ({"weights"} if offload.offload_train else set())


def _teacher_bytes(options: Options, models: Models, stage: int) -> int:
    """Weights of the teacher in its own layout and precision; of its largest stage where its pipeline is another."""
    if models.teacher is None or teaches_itself_now(options):
        return 0
    parallel = teacher_parallel(options, models.teacher)
    pipeline = parallel.pipeline_model_parallel_size
    stages = [stage] if pipeline == options.parallel.pipeline_model_parallel_size else range(pipeline)
    exact = 4 if teaches_itself_by_average(options) and teacher_number_bytes(options) < 4 else 0
    return (teacher_number_bytes(options) + exact) * max(
        _parameters(options, models.teacher, parallel, one).total for one in stages
    )


def teacher_number_bytes(options: Options, hidden: bool = False) -> int:
    """Bytes of a weight of the teacher or, with ``hidden``, of its hidden rows on the host."""
    own = options.opd.opd_teacher_dtype
    if hidden and options.opd.opd_teacher_hidden_dtype != "same":
        own = options.opd.opd_teacher_hidden_dtype
    return {"same": number_bytes(options.optimizer), "float32": 4, "bfloat16": 2}[own]


def _parameters(options: Options, model: ModelArchitecture, parallel: ParallelOptions, stage: int) -> Parameters:
    divisible_by = options.model.make_vocab_size_divisible_by
    return rank_parameters(model, parallel, stage, vocab_divisible_by=divisible_by)


def gradient_number_bytes(settings: OptimizerOptions) -> int:
    return 2 if settings.bf16 and not settings.accumulate_allreduce_grads_in_fp32 else 4


def optimizer_bytes(options: Options, held: Parameters) -> int:
    """Moments, and with ``--bf16`` main weights and, unless gradients are in float32 already, main gradients.

    With ``--use-distributed-optimizer`` the ranks that hold the same weights share it out.
    """
    settings = options.optimizer
    numbers = 2 if settings.optimizer == "adam" else int(settings.sgd_momentum > 0)
    if settings.bf16:
        numbers += 1 + int(gradient_number_bytes(settings) < 4)
    if not settings.use_distributed_optimizer:
        return 4 * numbers * held.total
    return 4 * numbers * (share(held.dense, dense_copies(options)) + share(held.experts, expert_copies(options)))


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


def head_bytes(options: Options, models: Models, device: DeviceKind) -> int:
    """Largest of what the vocabulary head holds besides its inputs: forward, backward, or measuring the exact KL.

    Forward: a chunk's logits in float32 and three blocks of temporaries (with ``--bf16`` first the logits in that).
    Backward: gradients of hidden rows and of the weight, the latter in float32, a chunk's logits and its part of
    either gradient; with ``--bf16`` also the logits' gradient, and at the end the weight's, in that. The exact KL:
    a chunk's logits of both models and two blocks of temporaries (with a teacher in bf16 first its logits in that), and
    the teacher's hidden rows; and its output weight where the teacher itself is elsewhere.
    """
    student, number = models.student, number_bytes(options.optimizer)
    rows = Work.of(options, student).rows
    tensor = options.parallel.tensor_model_parallel_size
    padded = student.padded_vocab_size(options.model.make_vocab_size_divisible_by, tensor) // tensor
    columns = min(padded, student.vocab_size)
    chunk = min(rows, tokens_of_chunk(padded, CHUNK_ELEMENTS[device], LEAST_CHUNK_TOKENS))
    logits = chunk * columns
    block = min(max(1, BLOCK_ELEMENTS[device] // columns) * columns, logits)
    short = number if number < 4 else 0
    weight = padded * student.hidden_size
    forward = 4 * logits + max(12 * block, short * logits)
    product = number * max(chunk * student.hidden_size, min(logits, weight) // 4)
    temporary = max(short * logits + product, short * weight)
    backward = number * rows * student.hidden_size + 4 * weight + 4 * logits + temporary
    exact = 0
    if models.teacher is not None and keeps_hidden_rows(options):
        teacher_short = teacher_number_bytes(options) if teacher_number_bytes(options) < 4 else 0
        exact = 8 * logits + max(8 * block, teacher_short * logits)
        exact += teacher_number_bytes(options, hidden=True) * rows * models.teacher.hidden_size
        if options.offload.offload_teacher or has_own_layout(options) or teaches_itself_now(options):
            exact += teacher_head_bytes(options, models.teacher)
    return max(forward, backward, exact) + STATISTICS_BYTES * rows


def teacher_head_bytes(options: Options, teacher: ModelArchitecture) -> int:
    """The teacher's output weight for the columns that the student has on a rank."""
    tensor = options.parallel.tensor_model_parallel_size
    columns = teacher.padded_vocab_size(options.model.make_vocab_size_divisible_by, tensor) // tensor
    return teacher_number_bytes(options) * columns * teacher.hidden_size


def keeps_hidden_rows(options: Options) -> bool:
    """Whether the teacher's hidden rows of a rollout are kept on the host, for the exact KL or the term itself."""
    measured = has_megatron_teacher(options) and options.opd.opd_exact_kl_interval > 0
    return measured or needs_teacher_hidden(options)


def rollout_bytes(options: Options, student: ModelArchitecture) -> int:
    """The local engine: the student's weights, keys and values of the sequences decoded together, their logits."""
    rollout, number = options.rollout, number_bytes(options.optimizer)
    samples = options.objective.loss_type == "policy_loss" and rollout.load_debug_rollout_data is None
    if options.engine.rollout_engine != "local" or (not samples and not options.evaluation.eval_prompt_data):
        return 0
    known = options.samples_per_rollout if rollout.rollout_batch_size else rollout.rollout_engine_batch_size
    sequences = min(rollout.rollout_engine_batch_size, known)
    position = 2 * student.num_layers * student.num_query_groups * student.kv_channels
    cache = sequences * Work.of(options, student).sample * position
    return number * (total_parameters(student) + cache) + sequences * student.vocab_size * (number + 8)
