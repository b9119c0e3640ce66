"""How many weights a rank holds, counted from the architecture and the layout; no torch, no Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.architecture import ModelArchitecture
from opd_megatron.config.options import ParallelOptions


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights of one rank: those of routed experts, and all others.

    They are told apart because fewer ranks hold the same experts, so that the distributed optimizer splits their state
    over fewer.
    """

    dense: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)


def total_parameters(model: ModelArchitecture) -> int:
    """Weights of the whole model, its vocabulary unpadded: the number that model cards give."""
    return rank_parameters(model, ParallelOptions(), 0, vocab_divisible_by=1).total


def rank_parameters(
    model: ModelArchitecture,
    parallel: ParallelOptions,
    stage: int,
    *,
    vocab_divisible_by: int,
    is_critic: bool = False,
) -> Parameters:
    """Weights of a rank of pipeline stage ``stage``, counted from 0.

    ``vocab_divisible_by`` is ``--make-vocab-size-divisible-by``. A critic has one number for each hidden channel, and a
    bias, where the model has its output weight. The sizes must divide (see ``validate``).
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = model.num_layers // pipeline
    counted = Parameters()
    for layer in range(stage * layers, (stage + 1) * layers):
        counted += layer_parameters(model, parallel, has_experts=model.has_experts(layer))
    is_first, is_last = stage == 0, stage == pipeline - 1
    # A tied output weight of another stage than the embedding's is a copy of it.
    output = is_last and (model.untie_embeddings_and_output_weights or not is_first) and not is_critic
    matrices = int(is_first) + int(output)
    rows = model.padded_vocab_size(vocab_divisible_by, tensor) // tensor
    final_norm = model.hidden_size if is_last else 0
    value_head = model.hidden_size + 1 if is_last and is_critic else 0
    return counted + Parameters(matrices * rows * model.hidden_size + final_norm + value_head)


def layer_parameters(model: ModelArchitecture, parallel: ParallelOptions, *, has_experts: bool) -> Parameters:
    """A rank's weights of one transformer layer: attention, feed-forward part and their norms."""
    hidden, tensor = model.hidden_size, parallel.tensor_model_parallel_size
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels // tensor
    attention = qkv * (hidden + int(model.add_qkv_bias))
    attention += hidden * model.num_attention_heads * model.kv_channels // tensor
    norms = 2 * hidden + (2 * model.kv_channels if model.qk_layernorm else 0)
    if not has_experts or model.mixture is None:
        return Parameters(attention + norms + 3 * hidden * model.ffn_hidden_size // tensor)
    mixture = model.mixture
    shared = 3 * hidden * (mixture.moe_shared_expert_intermediate_size or 0) // tensor
    router = hidden * (mixture.num_experts + int(mixture.moe_shared_expert_gate))
    held = mixture.num_experts // parallel.expert_model_parallel_size
    experts = held * 3 * hidden * mixture.moe_ffn_hidden_size // parallel.expert_tensor_size
    return Parameters(attention + norms + shared + router, experts)
