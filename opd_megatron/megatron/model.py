"""A decoder made of Megatron-Core's GPTModel that ends in hidden states instead of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from opd_megatron.config.architecture import ModelArchitecture, RopeScaling
from opd_megatron.config.options import ParallelOptions
from opd_megatron.megatron import cpu, moe
from opd_megatron.megatron.layers import block_spec, rotation, use_transformer_engine
from opd_megatron.megatron.micro_batch import SequenceLayout
from opd_megatron.megatron.packing import ContextSplit


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage returns the normed hidden states ``[s, b, h]``.

    With sequence parallelism they are this rank's ``[s/tp, b, h]``. The vocabulary head works from them in chunks (see
    ``vocab_head``), so no logits of a whole batch exist.
    """

    architecture: ModelArchitecture
    sequence_layout: SequenceLayout
    has_split_head = True
    """Whether what follows the last stage's output is split over the tensor-parallel ranks, as a vocabulary is."""

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args: Any,
        padding_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """What Megatron prepares for the layers, with two things of ours.

        ``padding_mask`` reaches them as it is: routers expect ``[b, s, n]`` (see ``moe.ExpertRouter``). Layers on plain
        torch get cosines and sines, of packed sequences those of each token's position (see ``layers.rotation``).
        """
        embedded, rotary, *inputs, _ = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        if self.sequence_layout.for_torch:
            rotary = rotation(rotary, self.config.params_dtype)
            if packed_seq_params is not None:
                rotary = rotary.index_select(1, position_ids[0])
        return embedded, rotary, *inputs, padding_mask

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's rows of the output weight, ``[padded_vocab / tp, h]``; last pipeline stage only."""
        if self.share_embeddings_and_output_weights:
            weight: Tensor = self.shared_embedding_or_output_weight()
            return weight
        return self.output_layer.weight


Model = TypeVar("Model", bound=HiddenStateModel)
"""A kind of model, such as one that ends in hidden states or in values."""

Models = HiddenStateModel | Sequence[HiddenStateModel]
"""A rank's part of the model: one chunk, or one per virtual pipeline stage."""


def chunks_of(models: Models) -> Sequence[HiddenStateModel]:
    """The chunks of a rank, in the order of the virtual stages."""
    return [models] if isinstance(models, HiddenStateModel) else models


def transformer_config(
    architecture: ModelArchitecture,
    parallel: ParallelOptions,
    dtype: torch.dtype,
    router_dtype: str | None = None,
    virtual_stages: int | None = None,
) -> TransformerConfig:
    """Megatron's configuration of ``architecture`` under the process groups of this run."""
    mixture = architecture.mixture
    return TransformerConfig(
        **(moe.mixture_settings(mixture, parallel, router_dtype) if mixture else {}),
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.add_qkv_bias,
        qk_layernorm=architecture.qk_layernorm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        moe_token_dispatcher_type="alltoall",  # what variable sequence lengths require
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1 and virtual_stages is None,
        # Of two ranks each is before and behind the other: only single messages keep the two directions apart.
        overlap_p2p_comm=virtual_stages is not None,
        batch_p2p_comm=virtual_stages is None,
        # The loss arrives divided by the whole step's count, so gradients are summed over ranks, not averaged.
        calculate_per_token_loss=True,
        # Weights always come from a file or from our seeded initialiser, in their final place.
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=cpu.has_cuda(),
        bias_dropout_fusion=cpu.has_cuda(),
    )


def build_model(
    architecture: ModelArchitecture,
    parallel: ParallelOptions,
    *,
    dtype: torch.dtype,
    make_vocab_size_divisible_by: int,
    router_dtype: str | None = None,
    without_memory: bool = False,
) -> HiddenStateModel:
    """This rank's part of the model, its weights not yet set; process groups must be initialised.

    ``without_memory`` makes one on torch's meta device, which has names and shapes only.
    """
    if without_memory:
        with torch.device("meta"):
            return build_model(
                architecture,
                parallel,
                dtype=dtype,
                make_vocab_size_divisible_by=make_vocab_size_divisible_by,
                router_dtype=router_dtype,
            )
    config = transformer_config(architecture, parallel, dtype, router_dtype)
    return _build_chunk(
        config, architecture, parallel, make_vocab_size_divisible_by, virtual_stage=None, kind=HiddenStateModel
    )


def build_chunks(
    architecture: ModelArchitecture,
    parallel: ParallelOptions,
    *,
    dtype: torch.dtype,
    make_vocab_size_divisible_by: int,
    router_dtype: str | None = None,
    kind: type[Model],
) -> list[Model]:
    """As :func:`build_model`, a chunk for each virtual stage of ``--num-layers-per-virtual-pipeline-stage``.

    The last one is where the hidden states come out, or what ``kind`` makes of them.
    """
    stages = parallel.virtual_stages(architecture.num_layers)
    config = transformer_config(architecture, parallel, dtype, router_dtype, stages)
    return [
        _build_chunk(config, architecture, parallel, make_vocab_size_divisible_by, virtual_stage=stage, kind=kind)
        for stage in (range(stages) if stages else [None])
    ]


def _build_chunk(
    config: TransformerConfig,
    architecture: ModelArchitecture,
    parallel: ParallelOptions,
    make_vocab_size_divisible_by: int,
    virtual_stage: int | None,
    kind: type[Model],
) -> Model:
    last_stage = (config.virtual_pipeline_model_parallel_size or 1) - 1
    model = kind(
        config=config,
        transformer_layer_spec=block_spec(config, virtual_stage),
        vocab_size=architecture.padded_vocab_size(make_vocab_size_divisible_by, parallel.tensor_model_parallel_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage() and not virtual_stage,
        post_process=parallel_state.is_pipeline_last_stage() and (virtual_stage or 0) == last_stage,
        share_embeddings_and_output_weights=not architecture.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
        vp_stage=virtual_stage,
    )
    model.architecture = architecture
    model.sequence_layout = sequence_layout(parallel, architecture)
    # The micro-batch builder knows the split over context-parallel ranks; Megatron would split the frequencies again.
    model.rotary_pos_emb.cp_group = None
    _mark_sharded_weights(model)
    moe.mark_expert_weights(model)
    if architecture.rope_scaling is not None:
        # Megatron-Core fixes the original context of Llama 3's scaling at 8192, so the frequencies are set from here.
        model.rotary_pos_emb.inv_freq = scale_frequencies(model.rotary_pos_emb.inv_freq, architecture.rope_scaling)
    return model if torch.get_default_device().type == "meta" else model.to(cpu.device())


def sequence_layout(parallel: ParallelOptions, architecture: ModelArchitecture) -> SequenceLayout:
    """How this rank lays sequences out for a model; process groups must be initialised."""
    return SequenceLayout(
        packed=parallel.qkv_format == "thd",
        length_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        split=ContextSplit(parallel.context_parallel_size, parallel_state.get_context_parallel_rank()),
        for_torch=not use_transformer_engine(),
        for_experts=architecture.mixture is not None,
    )


def _mark_sharded_weights(model: HiddenStateModel) -> None:
    """Tell Megatron which weights are shards.

    Its layers do so only when they initialise their weights; without the mark the gradient norm counts one
    tensor-parallel rank's shards alone.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)


def scale_frequencies(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rotary frequencies ``[d/2]``: long wavelengths are divided by the factor, short ones kept.

    Between them the two are blended linearly in ``original context / wavelength``. Source: the Llama 3.1 model code's
    ``apply_scaling`` as described in Meta's llama-models repository.
    """
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_position_embeddings / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
