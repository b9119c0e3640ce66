"""Tiny models and a tokenizer for the rollout's tests; the reference is always transformers' own model."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from opd_megatron.rollout.local import LocalEngine

FAMILIES = ("qwen2", "qwen3", "llama")
MIXTURES = ("qwen2_moe", "qwen3_moe")
CHARACTERS = "0123456789+-=,; " + string.ascii_lowercase
PAD, EOS, TURN = "<pad>", "<eos>", "<turn>"
VOCAB_SIZE = 3 + len(CHARACTERS)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and three special tokens with the ids 0, 1 and 2."""
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, TURN, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, additional_special_tokens=[TURN]
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: id 0 is the end token, the 256 bytes follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {EOS: 0} | {symbol: index + 1 for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Two layers, 4 heads in 2 groups; Llama with scaled RoPE whose original context is 32 positions.

    The mixtures choose 2 of 5 experts; that of Qwen2 has a shared expert, does not normalise, and begins dense.
    """
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": family == "qwen3",
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if family == "qwen3":
        settings["head_dim"] = 12
    if family == "llama":
        settings["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    if family in MIXTURES:
        settings |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    if family == "qwen2_moe":
        settings |= {"norm_topk_prob": False, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}
    classes = {
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "llama": LlamaConfig,
        "qwen2_moe": Qwen2MoeConfig,
        "qwen3_moe": Qwen3MoeConfig,
    }
    return classes[family](**(settings | overrides))


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
                    parameter.copy_(torch.randn_like(parameter))
    return model


def engine_with(model: Any, tokenizer: Any = None, **settings: Any) -> LocalEngine:
    """A local engine that speaks with the weights of ``model``."""
    engine = LocalEngine(model.config, tokenizer or character_tokenizer(), **settings)
    engine.update_weights(stored_weights(model).items(), "first")
    return engine


def stored_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model under the names that transformers stores them by, experts one by one."""
    names = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        if any(".experts." in name for name in names):
            model.save_pretrained(folder)
            return load_file(Path(folder) / "model.safetensors")
    return names
