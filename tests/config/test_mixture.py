"""Mixtures of experts in configs, in MODEL_ARGS and in layouts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from opd_megatron.config.architecture import architecture_from_hf, differences, disagreements, read_hf_config
from opd_megatron.config.errors import UserError
from opd_megatron.config.mixture import MixtureOfExperts, layer_pattern
from opd_megatron.config.parse import parse_options
from opd_megatron.config.validate_run import run_faults
from tests.config.inputs import hf_config, write_hf

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN2 = QWEN3 | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40, "norm_topk_prob": False}


def test_configs_that_transformers_writes(tmp_path: Path) -> None:
    """The field of the number of experts has two names."""
    Qwen3MoeConfig(
        num_hidden_layers=3, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True
    ).save_pretrained(tmp_path / "qwen3")
    model = architecture_from_hf(read_hf_config(tmp_path / "qwen3"))
    assert model.mixture == MixtureOfExperts(6, 20, 2, False, (1, 1, 1))
    assert (model.qk_layernorm, model.add_qkv_bias, model.dense_layers) == (True, False, 0)
    Qwen2MoeConfig(
        num_hidden_layers=5,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ).save_pretrained(tmp_path / "qwen2")
    model = architecture_from_hf(read_hf_config(tmp_path / "qwen2"))
    assert model.mixture == MixtureOfExperts(6, 20, 2, True, (0, 1, 0, 0, 0), 28, True)
    assert (model.qk_layernorm, model.add_qkv_bias, model.dense_layers) == (False, True, 4)
    assert [model.has_experts(layer) for layer in range(5)] == [False, True, False, False, False]


def test_a_mixture_without_a_layer_is_a_dense_model() -> None:
    model = architecture_from_hf(hf_config(**QWEN3 | {"mlp_only_layers": [0, 1, 2, 3]}))
    assert model.mixture is None
    assert not differences(model, architecture_from_hf(hf_config()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0 is no positive whole number"),
        ({"moe_intermediate_size": 1.5}, "moe_intermediate_size 1.5"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_experts 8"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob with one expert per token"),
        ({"model_type": "qwen2_moe"}, "shared_expert_intermediate_size is missing"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        architecture_from_hf(hf_config(**QWEN3 | changes), source="DIR")
    assert str(caught.value).startswith("DIR: ")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("1", (1, 1, 1, 1)),
        ("2", (1, 0, 1, 0)),
        ("[0]*1+[1]*3", (0, 1, 1, 1)),
        ("([0, 1]*2)", (0, 1, 0, 1)),
        ("[1,0,0,1]", (1, 0, 0, 1)),
    ],
)
def test_layer_frequencies(text: str, pattern: tuple[int, ...]) -> None:
    assert layer_pattern(text, 4) == pattern


@pytest.mark.parametrize("text", ["0", "[1]*3", "[2]*4", "[1]*4+1", "range(4)", "[1]*99999"])
def test_layer_frequencies_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=r"number|list"):
        layer_pattern(text, 4)


def found(line: str, **changes: Any) -> list[str]:
    options = parse_options(line.split())
    return disagreements(options.given, options.model, architecture_from_hf(hf_config(**changes)))


WHOLE = "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --kv-channels 16 "
WHOLE += "--group-query-attention --num-query-groups 2 "
EXPERTS = "--num-experts 8 --moe-ffn-hidden-size 24 --moe-router-topk 2 "


def test_every_field_of_a_mixture_that_disagrees_is_named() -> None:
    assert found(WHOLE + "--qk-layernorm " + EXPERTS, **QWEN3) == []
    assert found(WHOLE + "--qk-layernorm " + EXPERTS + "--moe-layer-freq [1]*4", **QWEN3) == []
    assert found("--num-experts 4 --moe-router-topk 3 --moe-router-pre-softmax --moe-layer-freq [1]*3", **QWEN3) == [
        "--num-experts 4 (config: 8)",
        "--moe-router-topk 3 (config: 2)",
        "--moe-router-pre-softmax (config: False)",
        "--moe-layer-freq [1]*3 (config: (1, 1, 1, 1))",
    ]
    assert found(WHOLE + "--add-qkv-bias", **QWEN2 | {"mlp_only_layers": [1]}) == [
        "--num-experts is missing (config: 8)",
        "--moe-ffn-hidden-size is missing (config: 24)",
        "--moe-router-topk is missing (config: 2)",
        "--moe-router-pre-softmax is missing (config: True)",
        "--moe-layer-freq is missing (config: (1, 0, 1, 1))",
        "--moe-shared-expert-intermediate-size is missing (config: 40)",
        "--moe-shared-expert-gate is missing (config: True)",
    ]
    assert found(WHOLE + "--qk-layernorm --num-experts 8 --moe-layer-freq 1") == [
        "--num-experts 8 (config: None)",
        "--moe-layer-freq 1 (config: None)",
    ]


def test_differences_name_the_fields_of_the_mixture() -> None:
    mine, theirs = (architecture_from_hf(hf_config(**QWEN3 | {"num_experts": count})) for count in (8, 4))
    assert differences(mine, theirs) == ["num_experts 8 (not 4)"]
    assert "num_experts 8 (not None)" in differences(mine, architecture_from_hf(hf_config()))
    assert dataclasses.replace(mine, family="qwen2_moe") != mine


def faults(tmp_path: Path, line: str, model: dict[str, Any] = QWEN3) -> list[str]:
    folder = tmp_path / "student"
    if not folder.exists():
        write_hf(folder, **model)
    base = f"--hf-checkpoint {folder} --rollout-batch-size 12 --num-rollout 2 "
    return run_faults(parse_options((base + line).split()))


EP = "--expert-model-parallel-size"
TP2 = "--tensor-model-parallel-size 2"


@pytest.mark.parametrize(
    "line",
    [
        f"{EP} 2 --actor-num-gpus-per-node 2",
        f"{EP} 2 --actor-num-gpus-per-node 4",
        f"{EP} 4 --expert-tensor-parallel-size 1 {TP2} --sequence-parallel --actor-num-gpus-per-node 4",
        f"{TP2} --sequence-parallel --actor-num-gpus-per-node 2 --moe-aux-loss-coeff 0.1",
        "--moe-router-load-balancing-type none --moe-router-dtype fp32",
    ],
)
def test_layouts_that_fit(tmp_path: Path, line: str) -> None:
    assert faults(tmp_path, line) == []


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        (f"{EP} 2", [f"{EP} 2 x --pipeline-model-parallel-size 1 x 1 tensor-parallel ranks of an expert", "1 ranks"]),
        (f"{EP} 3 --actor-num-gpus-per-node 3", [f"{EP} 3 does not divide the model's 8 experts"]),
        (
            f"{EP} 2 {TP2} --sequence-parallel --actor-num-gpus-per-node 2",
            ["x 2 tensor-parallel ranks of an expert does not divide the 2 ranks", "--expert-tensor-parallel-size 1"],
        ),
        (
            f"{TP2} --sequence-parallel --expert-tensor-parallel-size 1 --actor-num-gpus-per-node 2",
            ["--expert-tensor-parallel-size 1 is not --tensor-model-parallel-size 2, which needs"],
        ),
        (f"{TP2} --actor-num-gpus-per-node 2", ["with a mixture of experts needs --sequence-parallel"]),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
            ["--recompute-method block does not go with a mixture of experts"],
        ),
        (
            "--moe-aux-loss-coeff 0.1 --moe-router-load-balancing-type none",
            ["--moe-aux-loss-coeff has no effect with --moe-router-load-balancing-type none"],
        ),
    ],
)
def test_layouts_and_options_that_do_not_fit(tmp_path: Path, line: str, messages: list[str]) -> None:
    text = "; ".join(faults(tmp_path, line))
    assert all(message in text for message in messages), text


def test_channels_of_experts_are_divided_by_their_own_ranks(tmp_path: Path) -> None:
    model = QWEN2 | {"moe_intermediate_size": 25, "shared_expert_intermediate_size": 41, "mlp_only_layers": []}
    line = f"{TP2} --sequence-parallel --actor-num-gpus-per-node 2 "
    assert faults(tmp_path, line, model | {"intermediate_size": 49}) == [
        "--tensor-model-parallel-size 2 does not divide the model's 25 feed-forward channels of an expert",
        "--tensor-model-parallel-size 2 does not divide the model's 41 feed-forward channels of the shared expert",
    ]


def test_a_dense_student_has_no_experts(tmp_path: Path) -> None:
    line = f"{EP} 2 --actor-num-gpus-per-node 2 --moe-aux-loss-coeff 0.1"
    first, second = faults(tmp_path, line, {})
    assert first == "--moe-aux-loss-coeff is for a mixture of experts, which the student is not: leave it out"
    assert "are for a mixture of experts, which no model of this run is: leave them out" in second
