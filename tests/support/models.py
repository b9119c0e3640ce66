"""Tiny models of every family, for all tests; the reference is always transformers' own model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

FAMILIES = ("qwen2", "qwen3", "llama")
MIXTURES = ("qwen3_moe", "qwen2_moe")

_CLASSES = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
}


def family_config(family: str, *, vocab_size: int, original_context: int, **overrides: Any) -> PreTrainedConfig:
    """Two layers, 4 heads in 2 groups; Qwen3 is tied, and its heads are not hidden / heads wide.

    Llama has scaled RoPE with ``original_context`` positions before the scaling. The mixtures choose 2 of 4 experts;
    that of Qwen2 has four layers, one of them dense, a shared expert, and does not normalise.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": family == "qwen3",
    }
    if family.startswith("qwen3"):
        settings["head_dim"] = 12
    if family == "llama":
        settings["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original_context,
        }
    if family in MIXTURES:
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    if family == "qwen2_moe":
        settings |= {"norm_topk_prob": False, "shared_expert_intermediate_size": 40, "num_hidden_layers": 4}
        settings["mlp_only_layers"] = [1]
    return _CLASSES[family](**(settings | overrides))


def reference_model(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with random weights, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
                elif name.endswith("bias"):
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model
