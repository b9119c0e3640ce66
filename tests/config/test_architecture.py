"""Architectures from the configs that transformers writes, and MODEL_ARGS that disagree with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from opd_megatron.config.architecture import (
    RopeScaling,
    architecture_from_hf,
    differences,
    disagreements,
    read_hf_config,
)
from opd_megatron.config.errors import UserError
from opd_megatron.config.parse import parse_options
from tests.config.inputs import hf_config

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def saved(config: Any, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return read_hf_config(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2(tied: bool, tmp_path: Path) -> None:
    config = Qwen2Config(
        num_hidden_layers=3,
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=1001,
        max_position_embeddings=77,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.03,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    )
    model = architecture_from_hf(saved(config, tmp_path))
    assert dataclasses.asdict(model) == {
        "family": "qwen2",
        "num_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 1001,
        "max_position_embeddings": 77,
        "rotary_base": 12345.0,
        "norm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not tied,
        "rope_scaling": None,
        "init_method_std": 0.03,
        "mixture": None,
    }
    assert model.padded_vocab_size(128, 1) == 1024
    assert model.padded_vocab_size(128, 3) == 1152


def test_qwen3_has_heads_of_their_own_size(tmp_path: Path) -> None:
    model = architecture_from_hf(saved(Qwen3Config(hidden_size=48, num_attention_heads=32, head_dim=16), tmp_path))
    assert (model.kv_channels, model.qk_layernorm, model.add_qkv_bias) == (16, True, False)


def test_llama_with_scaled_positions(tmp_path: Path) -> None:
    config = LlamaConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3})
    model = architecture_from_hf(saved(config, tmp_path))
    assert model.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 64)
    assert (model.rotary_base, model.add_qkv_bias, model.qk_layernorm) == (500000.0, False, False)
    assert model.num_query_groups == model.num_attention_heads == 32


def test_the_older_spelling_of_the_rotary_settings() -> None:
    config = hf_config(model_type="llama", rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **LLAMA3})
    del config["rope_parameters"]
    model = architecture_from_hf(config)
    assert (model.rotary_base, model.rope_scaling) == (500000.0, RopeScaling(32.0, 1.0, 4.0, 64))
    assert architecture_from_hf(config | {"rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers 'four' is no positive whole number"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"hidden_size": 32.5}, "hidden_size 32.5"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": None}, "head_dim is missing"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        architecture_from_hf(hf_config(**changes), source="DIR")
    assert str(caught.value).startswith("DIR: ")


def test_configs_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        read_hf_config(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="not"):
            read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    assert read_hf_config(tmp_path) == hf_config()


def found(line: str, **changes: Any) -> list[str]:
    options = parse_options(line.split())
    return disagreements(options.given, options.model, architecture_from_hf(hf_config(**changes)))


SCALED = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3}}


def test_options_given_alone_are_compared_one_by_one() -> None:
    assert found("") == []
    assert found("--num-layers 4 --norm-epsilon 0.000001 --rotary-base 1e6 --init-method-std 0.5") == []
    assert found("--num-layers 3 --qk-layernorm=false --untie-embeddings-and-output-weights --kv-channels 8") == [
        "--num-layers 3 (config: 4)",
        "--kv-channels 8 (config: 16)",
        "--qk-layernorm=false (config: True)",
        "--untie-embeddings-and-output-weights (config: False)",
    ]
    assert found("--group-query-attention", num_key_value_heads=4) == ["--group-query-attention (config: False)"]
    assert found("--use-rope-scaling --rope-scaling-factor 8") == [
        "--use-rope-scaling (config: False)",
        "--rope-scaling-factor 8.0 (config: None)",
    ]
    assert found("--use-rope-scaling --rope-scaling-factor 8", **SCALED) == ["--rope-scaling-factor 8.0 (config: 32.0)"]


WHOLE = "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4"


def test_a_whole_model_must_have_its_switches() -> None:
    assert found(WHOLE, tie_word_embeddings=False, **SCALED) == [
        "--kv-channels is missing (config: 16)",
        "--qk-layernorm is missing (config: True)",
        "--untie-embeddings-and-output-weights is missing (config: True)",
        "--group-query-attention is missing (config: True)",
        "--use-rope-scaling is missing (config: True)",
    ]
    assert found(WHOLE, model_type="llama", head_dim=8, num_key_value_heads=4) == []
    assert found(WHOLE + " --qk-layernorm --kv-channels 16 --group-query-attention --num-query-groups 2") == []


def test_differences_of_two_models() -> None:
    mine = architecture_from_hf(hf_config())
    theirs = architecture_from_hf(hf_config(num_hidden_layers=6, vocab_size=101, initializer_range=0.5))
    assert differences(mine, theirs) == ["num_layers 4 (not 6)", "vocab_size 100 (not 101)"]
    assert differences(mine, mine) == []
