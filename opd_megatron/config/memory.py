"""Bytes of each rank, predicted from the architecture, the options and the layout; no torch, no Megatron.

What is counted follows what Megatron-Core and this library allocate; ``tests/megatron/test_memory.py`` holds it against
measured allocations. Letters as in Korthikanti et al. (arXiv 2205.05198), from which the way of counting activations
is taken: ``t`` tokens of a micro-batch on a rank, ``h`` hidden size, ``a`` query heads and ``g`` key/value heads of
size ``d``, ``f`` feed-forward size, ``V`` rows of the output weight on a rank, ``e`` bytes of a number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.options import OptimizerOptions, Options, ParallelOptions
from opd_megatron.config.parameters import Parameters, rank_parameters, total_parameters
from opd_megatron.config.resolve import needs_reference, teacher_folder
from opd_megatron.config.vocab_chunks import (
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    LEAST_CHUNK_TOKENS,
    DeviceKind,
    tokens_of_chunk,
)

ASSUMED_PROMPT_TOKENS = 1024
"""Length of a prompt where ``--rollout-max-prompt-len`` does not bound it."""
STATISTICS_BYTES = 64
"""Bytes per response token of ids, log-probabilities, weights and the like on the device."""


@dataclass(frozen=True)
class Models:
    """The models of a run; ``teacher`` is that of ``--opd-teacher-load``."""

    student: ModelArchitecture
    teacher: ModelArchitecture | None = None
    has_reference: bool = False

    @classmethod
    def of(cls, options: Options, student: ModelArchitecture, teacher: ModelArchitecture | None) -> Models:
        """``teacher`` is left out where the options give it nothing to do."""
        return cls(student, teacher if teacher_folder(options) else None, needs_reference(options))


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    ``activations`` are kept between forward and backward, ``recomputed`` those of the layers that are made again at a
    time. ``head`` are the chunked vocabulary head's buffers and gradients, ``rollout`` the local engine with its cache
    of keys and values, which only the controller's device has. ``host`` are the teacher's hidden rows in the host's
    memory, of which each rank keeps its own, and no part of the total. The total counts everything as if it were there
    at once: controller and trainer are different processes, and the memory that one has freed stays with it.
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

    @property
    def device_parts(self) -> dict[str, int]:
        """What the device holds, by name."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in ("stage", "host")
        }

    @property
    def total(self) -> int:
        return sum(self.device_parts.values())


@dataclass(frozen=True)
class Saved:
    """What a layer keeps for its backward pass, in rows of one number per token and channel.

    ``hidden`` rows of ``h``, ``qk_norm`` rows of the normalised heads ``(a + g) d``, ``qkv`` rows of ``(a + 2g) d``,
    ``context`` rows of ``a d``, ``feed_forward`` rows of ``f``; the ``float32`` ones are kept in that precision
    whatever the model's. ``core_attention`` are the rows of ``(a + 2g) d`` that selective recomputation drops.
    """

    hidden: float
    hidden_float32: float
    qk_norm: float
    qk_norm_float32: float
    qkv: float
    core_attention: float
    context: float
    feed_forward: float


SAVED: dict[DeviceKind, Saved] = {
    # Transformer Engine: each norm's input and output; attention by blocks that keeps queries, keys, values and its
    # output; the gated unit's two inputs and its product.
    "cuda": Saved(
        hidden=4, hidden_float32=0, qk_norm=1, qk_norm_float32=0, qkv=1, core_attention=0, context=1, feed_forward=3
    ),
    # Our layer on plain torch keeps what autograd does, see megatron/layers.py.
    "cpu": Saved(
        hidden=4, hidden_float32=2, qk_norm=1, qk_norm_float32=1, qkv=1, core_attention=1, context=2, feed_forward=5
    ),
}


def estimate(options: Options, models: Models, device: DeviceKind) -> RankMemory:
    """The rank that needs most; its pipeline stage is named in the result. The layout must be valid."""
    stages = range(options.parallel.pipeline_model_parallel_size)
    return max((estimate_stage(options, models, stage, device) for stage in stages), key=lambda memory: memory.total)


def estimate_stage(options: Options, models: Models, stage: int, device: DeviceKind) -> RankMemory:
    """A rank of pipeline stage ``stage``, counted from 0, of the first data-parallel group."""
    settings, student = options.optimizer, models.student
    held = _parameters(options, student, stage)
    number = number_bytes(settings)
    work = Work.of(options, student)
    is_last = stage == options.parallel.pipeline_model_parallel_size - 1
    teacher = number * _parameters(options, models.teacher, stage).total if models.teacher else 0
    host = 0
    if models.teacher is not None and keeps_hidden_rows(options) and is_last:
        host = work.rollout_rows * models.teacher.hidden_size * number
    activations, recomputed = activation_bytes(options, student, stage, device)
    return RankMemory(
        stage=stage,
        weights=number * held.total,
        gradients=gradient_number_bytes(settings) * held.total,
        optimizer=optimizer_bytes(options, held),
        activations=activations,
        recomputed=recomputed,
        head=head_bytes(options, models, device) if is_last else 0,
        teacher=teacher,
        reference=number * held.total if models.has_reference else 0,
        rollout=rollout_bytes(options, student) if stage == 0 else 0,
        host=host,
    )


def _parameters(options: Options, model: ModelArchitecture, stage: int) -> Parameters:
    divisible_by = options.model.make_vocab_size_divisible_by
    return rank_parameters(model, options.parallel, stage, vocab_divisible_by=divisible_by)


def number_bytes(settings: OptimizerOptions) -> int:
    """Bytes of a weight or an activation."""
    return 2 if settings.bf16 else 4


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
    return 4 * numbers * (_share(held.dense, dense_copies(options)) + _share(held.experts, expert_copies(options)))


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


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)


@dataclass(frozen=True)
class Work:
    """Tokens: of a sample at its longest; of a micro-batch on one rank, and those of them that are of responses.

    ``rollout_rows`` are the response tokens of a whole rollout on one rank.
    """

    sample: int
    tokens: int
    rows: int
    rollout_rows: int

    @classmethod
    def of(cls, options: Options, student: ModelArchitecture) -> Work:
        rollout, training = options.rollout, options.training
        context = options.parallel.context_parallel_size
        prompt = rollout.rollout_max_prompt_len or ASSUMED_PROMPT_TOKENS
        sample = min(prompt + rollout.rollout_max_response_len, student.max_position_embeddings)
        response = min(rollout.rollout_max_response_len, sample)
        if training.use_dynamic_batch_size and training.max_tokens_per_gpu is not None:
            tokens = max(training.max_tokens_per_gpu, _share(sample, context))  # a longer one is alone
        else:
            tokens = training.micro_batch_size * _share(sample, context)
        samples = options.samples_per_rollout if rollout.rollout_batch_size else training.global_batch_size or 0
        return cls(
            sample=sample,
            tokens=tokens,
            rows=_share(tokens * response, sample),
            rollout_rows=_share(samples, options.data_parallel_size) * _share(response, context),
        )


def activation_bytes(options: Options, model: ModelArchitecture, stage: int, device: DeviceKind) -> tuple[int, int]:
    """What the micro-batches that a stage has under way keep for their backward passes, and what is made again.

    With full recomputation only the units' inputs are kept, and one unit is made again at a time.
    """
    parallel, number = options.parallel, number_bytes(options.optimizer)
    work = Work.of(options, model)
    pipeline = parallel.pipeline_model_parallel_size
    count = model.num_layers // pipeline
    layers = [
        layer_activation_bytes(options, model, work.tokens, device, has_experts=model.has_experts(layer))
        for layer in range(stage * count, (stage + 1) * count)
    ]
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    channels = work.tokens * model.hidden_size // split
    between = number * channels
    kept, again = sum(layers), 0
    if parallel.recompute_granularity == "full":
        size = min(parallel.recompute_num_layers or 1, count)
        if parallel.recompute_method == "block":
            kept, again = size * between + sum(layers[size:]), max(layers)
        else:
            kept, again = _share(count, size) * between, size * max(layers)
    under_way = _under_way(options, model, stage)
    if stage == pipeline - 1:
        final_norm = between + (4 * channels if SAVED[device].hidden_float32 else 0)
        kept += final_norm + number * work.rows * model.hidden_size
    return round(under_way * kept), again


def _under_way(options: Options, model: ModelArchitecture, stage: int) -> float:
    """Micro-batches, counted in all of the rank's layers, that a stage has between forward and backward at most.

    One forward, one backward: stage ``i`` of ``p`` has ``p - i``. With ``v`` virtual stages of a rank it has
    ``(v - 1) p + 2 (p - i - 1) + 1`` of one virtual stage each (Narayanan et al., arXiv 2104.04473, section 2.2, as
    Megatron-Core's schedule counts them).
    """
    pipeline = options.parallel.pipeline_model_parallel_size
    virtual = options.parallel.virtual_stages(model.num_layers)
    if virtual is None:
        limit: float = pipeline - stage
    else:
        limit = ((virtual - 1) * pipeline + 2 * (pipeline - stage - 1) + 1) / virtual
    return min(limit, _micro_batches(options) or limit)


def _micro_batches(options: Options) -> int | None:
    """Micro-batches of an optimizer step on one rank, None where their number depends on the lengths."""
    training = options.training
    if training.use_dynamic_batch_size or (
        training.global_batch_size is None and not options.rollout.rollout_batch_size
    ):
        return None
    return _share(options.global_batch_size, options.data_parallel_size * training.micro_batch_size)


def layer_activation_bytes(
    options: Options, model: ModelArchitecture, tokens: int, device: DeviceKind, *, has_experts: bool
) -> int:
    """What one layer keeps of one micro-batch for its backward pass."""
    parallel, saved, number = options.parallel, SAVED[device], number_bytes(options.optimizer)
    tensor = parallel.tensor_model_parallel_size
    split = tensor if parallel.sequence_parallel else 1
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    rows = model.hidden_size * (number * saved.hidden + 4 * saved.hidden_float32) / split
    if model.qk_layernorm:
        rows += (heads + groups) * size * (number * saved.qk_norm + 4 * saved.qk_norm_float32) / tensor
    qkv = saved.qkv + (saved.core_attention if parallel.recompute_granularity is None else 0)
    rows += number * ((heads + 2 * groups) * qkv + heads * saved.context) * size / tensor
    if has_experts and model.mixture is not None:
        rows += _expert_row_bytes(model, parallel, number, saved)
    else:
        rows += number * saved.feed_forward * model.ffn_hidden_size / tensor
    return round(tokens * rows)


def _expert_row_bytes(model: ModelArchitecture, parallel: ParallelOptions, number: int, saved: Saved) -> float:
    """Bytes per token of a mixture that is balanced: what the router, the chosen and the shared experts keep.

    Tokens reach their experts as copies, one per choice; every rank of an expert's tensor-parallel group has those of
    all of them. The router works in float32.
    """
    mixture = model.mixture
    assert mixture is not None
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    copies = mixture.moe_router_topk * parallel.expert_tensor_size / split
    width = saved.feed_forward * mixture.moe_ffn_hidden_size / parallel.expert_tensor_size
    routed = copies * number * (2 * model.hidden_size + width)
    shared = saved.feed_forward * (mixture.moe_shared_expert_intermediate_size or 0)
    return routed + 4 * 3 * mixture.num_experts / split + number * shared / parallel.tensor_model_parallel_size


def head_bytes(options: Options, models: Models, device: DeviceKind) -> int:
    """Largest of what the vocabulary head holds besides its inputs: forward, backward, or measuring the exact KL.

    Forward: a chunk's logits in float32 and three blocks of temporaries (with ``--bf16`` first the logits in that).
    Backward: gradients of hidden rows and of the weight, the latter in float32, a chunk's logits and its part of
    either gradient; with ``--bf16`` also the logits' gradient, and at the end the weight's, in that. The exact KL:
    logits of both models and two temporaries of their size, and the teacher's hidden rows.
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
        exact = 16 * logits + number * rows * models.teacher.hidden_size
    return max(forward, backward, exact) + STATISTICS_BYTES * rows


def keeps_hidden_rows(options: Options) -> bool:
    """Whether the teacher's hidden rows of a rollout are kept on the host, for the exact KL or the baseline."""
    opd = options.opd
    return opd.use_opd and (opd.opd_exact_kl_interval > 0 or opd.opd_baseline != "none")


def rollout_bytes(options: Options, student: ModelArchitecture) -> int:
    """The local engine: the student's weights, keys and values of the sequences decoded together, their logits."""
    rollout, number = options.rollout, number_bytes(options.optimizer)
    samples = options.objective.loss_type == "policy_loss" and rollout.load_debug_rollout_data is None
    if not samples and not options.evaluation.eval_prompt_data:
        return 0
    known = options.samples_per_rollout if rollout.rollout_batch_size else rollout.rollout_engine_batch_size
    sequences = min(rollout.rollout_engine_batch_size, known)
    position = 2 * student.num_layers * student.num_query_groups * student.kv_channels
    cache = sequences * Work.of(options, student).sample * position
    return number * (total_parameters(student) + cache) + sequences * student.vocab_size * (number + 8)
