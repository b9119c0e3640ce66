"""What the layers keep between forward and backward, and how many tokens they work on; no torch, no Megatron.

Letters as in Korthikanti et al. (arXiv 2205.05198), from which the way of counting is taken: ``h`` hidden size, ``a``
query heads and ``g`` key/value heads of size ``d``, ``f`` feed-forward size.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.options import OptimizerOptions, Options, ParallelOptions
from opd_megatron.config.vocab_chunks import DeviceKind

ASSUMED_PROMPT_TOKENS = 1024
"""Length of a prompt where ``--rollout-max-prompt-len`` does not bound it."""


@dataclass(frozen=True)
class Saved:
    """What a layer keeps for its backward pass, in rows of one number per token and channel.

    ``hidden`` rows of ``h``, ``qk_norm`` rows of the normalised heads ``(a + g) d``, ``qkv`` rows of ``(a + 2g) d``,
    ``context`` rows of ``a d``, ``feed_forward`` rows of ``f`` (``experts`` in a mixture's), all in the model's
    precision. ``core_attention`` are the rows of ``(a + 2g) d`` that selective recomputation drops.
    """

    hidden: float
    qk_norm: float
    qkv: float
    core_attention: float
    context: float
    feed_forward: float
    experts: float


SAVED: dict[DeviceKind, Saved] = {
    # Transformer Engine: each norm's input and output; attention by blocks that keeps queries, keys, values and its
    # output; the gated unit's two inputs and its product.
    "cuda": Saved(hidden=4, qk_norm=1, qkv=1, core_attention=0, context=1, feed_forward=3, experts=3),
    # Our layer on plain torch, see megatron/layers.py: the sequences of a micro-batch are gathered by length for
    # attention and put back in order; each step of an expert's gated unit keeps its own.
    "cpu": Saved(hidden=4, qk_norm=1, qkv=1, core_attention=1, context=2, feed_forward=3, experts=5),
}


def number_bytes(settings: OptimizerOptions) -> int:
    """Bytes of a weight or an activation."""
    return 2 if settings.bf16 else 4


def share(count: int, ranks: int) -> int:
    return -(-count // ranks)


@dataclass(frozen=True)
class Work:
    """Tokens: of a sample at its longest; of a micro-batch on one rank, and those of them that are of responses.

    ``rollout_rows`` are the response tokens of a whole rollout on one rank. With ``--opd-include-prompt`` the prompt's
    tokens count as those of responses.
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
        sample = min(prompt + options.training_response_len, student.max_position_embeddings)
        response = sample if options.opd.opd_include_prompt else min(options.training_response_len, sample)
        if training.use_dynamic_batch_size and training.max_tokens_per_gpu is not None:
            tokens = max(training.max_tokens_per_gpu, share(sample, context))  # a longer one is alone
        else:
            tokens = training.micro_batch_size * share(sample, context)
        samples = options.samples_per_rollout if rollout.rollout_batch_size else training.global_batch_size or 0
        return cls(
            sample=sample,
            tokens=tokens,
            rows=share(tokens * response, sample),
            rollout_rows=share(samples, options.data_parallel_size) * share(response, context),
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
    between = number * work.tokens * model.hidden_size // split
    kept, again = sum(layers), 0
    if parallel.recompute_granularity == "full":
        size = min(parallel.recompute_num_layers or 1, count)
        if parallel.recompute_method == "block":
            kept, again = size * between + sum(layers[size:]), max(layers)
        else:
            kept, again = share(count, size) * between, size * max(layers)
    under_way = _under_way(options, model, stage)
    if stage == pipeline - 1:
        kept += between + number * work.rows * model.hidden_size
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
    return share(options.global_batch_size, options.data_parallel_size * training.micro_batch_size)


def layer_activation_bytes(
    options: Options, model: ModelArchitecture, tokens: int, device: DeviceKind, *, has_experts: bool
) -> int:
    """What one layer keeps of one micro-batch for its backward pass."""
    parallel, saved, number = options.parallel, SAVED[device], number_bytes(options.optimizer)
    tensor = parallel.tensor_model_parallel_size
    split = tensor if parallel.sequence_parallel else 1
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    rows = model.hidden_size * number * saved.hidden / split
    if model.qk_layernorm:
        rows += (heads + groups) * size * number * saved.qk_norm / tensor
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
    width = saved.experts * mixture.moe_ffn_hidden_size / parallel.expert_tensor_size
    routed = copies * number * (2 * model.hidden_size + width)
    shared = saved.experts * (mixture.moe_shared_expert_intermediate_size or 0)
    return routed + 4 * 3 * mixture.num_experts / split + number * shared / parallel.tensor_model_parallel_size
