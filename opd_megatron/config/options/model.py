"""The architecture of the model."""

from __future__ import annotations

from dataclasses import dataclass

from opd_megatron.config.declare import option
from opd_megatron.config.mixture import MixtureOptions


@dataclass(frozen=True)
class ModelOptions(MixtureOptions):
    """Model architecture (MODEL_ARGS; all may be left out where the checkpoint folder has a config)"""

    num_layers: int | None = option(None, "transformer layers", minimum=1)
    hidden_size: int | None = option(None, "hidden size", minimum=1)
    ffn_hidden_size: int | None = option(None, "feed-forward size", minimum=1)
    num_attention_heads: int | None = option(None, "query heads", minimum=1)
    group_query_attention: bool = option(False, "grouped-query attention (needs --num-query-groups)")
    num_query_groups: int | None = option(None, "key/value heads", minimum=1)
    kv_channels: int | None = option(None, "size of one head (default hidden size / heads)", minimum=1)
    qk_layernorm: bool = option(False, "normalise queries and keys per head (Qwen3)")
    add_qkv_bias: bool = option(False, "bias in the query, key and value projections (Qwen2)")
    disable_bias_linear: bool = option(False, "no bias in the other linear layers")
    swiglu: bool = option(False, "gated SiLU feed-forward")
    normalization: str | None = option(None, "normalisation layer", choices=("RMSNorm",))
    norm_epsilon: float | None = option(None, "epsilon of the normalisation", above=0.0)
    position_embedding_type: str | None = option(None, "position embedding", choices=("rope",))
    use_rotary_position_embeddings: bool = option(False, "same as --position-embedding-type rope")
    rotary_base: float | None = option(None, "base of the rotary embedding", above=0.0)
    use_rope_scaling: bool = option(False, "Llama 3's scaling of the rotary frequencies")
    rope_scaling_factor: float | None = option(None, "factor of --use-rope-scaling", above=0.0)
    untie_embeddings_and_output_weights: bool = option(False, "output weights of their own")
    vocab_size: int | None = option(None, "vocabulary size before padding", minimum=1)
    max_position_embeddings: int | None = option(None, "longest sequence of the model", unit="tokens", minimum=1)
    make_vocab_size_divisible_by: int = option(
        128, "pad the vocabulary to a multiple of this times the tensor-parallel size", minimum=1, maximum=65536
    )
    init_method_std: float | None = option(
        None, "standard deviation of random initial weights (default: the config's)", above=0.0
    )
    attention_dropout: float = option(0.0, "only 0: log-probabilities must not be random", minimum=0.0, maximum=0.0)
    hidden_dropout: float = option(0.0, "only 0: log-probabilities must not be random", minimum=0.0, maximum=0.0)
