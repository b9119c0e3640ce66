"""``MODEL_ARGS`` of scripts/models against the published configs of the checkpoints they are for."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from opd_megatron.config.architecture import ModelArchitecture, architecture_from_hf, disagreements
from opd_megatron.config.options import ModelOptions
from opd_megatron.config.parse import parse_groups

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "models"
ROWS = json.loads((Path(__file__).parent / "fixtures" / "published_configs.json").read_text())["rows"]
EVERY_ROW = pytest.mark.parametrize("row", ROWS, ids=[row["checkpoint"] for row in ROWS])


@functools.cache
def sourced(script: str, environment: tuple[tuple[str, str], ...] = ()) -> tuple[str, ...]:
    """The elements of ``MODEL_ARGS`` after sourcing ``script`` in a strict bash."""
    command = 'set -euo pipefail; source "$1"; printf "%s\\0" "${MODEL_ARGS[@]}"'
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MODEL_ARGS")}
    done = subprocess.run(
        ["bash", "-c", command, "bash", str(SCRIPTS / script)],
        env=inherited | dict(environment), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return tuple(done.stdout.split("\0")[:-1])


def parsed(row: dict[str, Any]) -> tuple[ModelOptions, frozenset[str]]:
    arguments = sourced(row["script"], tuple(row["environment"].items()))
    groups = parse_groups(arguments, {"model": ModelOptions}, prog="test", description="")
    return groups[ModelOptions], groups.given


def expected_options(config: dict[str, Any]) -> dict[str, Any]:
    """What the flags must say, from the published config and what each family is known for."""
    scaling = config.get("rope_scaling")
    heads = config["num_attention_heads"]
    normalised = config.get("norm_topk_prob", True)
    return {
        "num_experts": config.get("num_experts"),
        "moe_router_topk": config.get("num_experts_per_tok"),
        "moe_ffn_hidden_size": config.get("moe_intermediate_size"),
        "moe_router_pre_softmax": not normalised,
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": config["num_key_value_heads"] != heads,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim", config["hidden_size"] // heads),
        "qk_layernorm": config["model_type"] in ("qwen3", "qwen3_moe"),
        "add_qkv_bias": config["model_type"] == "qwen2",
        "disable_bias_linear": True,
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "position_embedding_type": "rope",
        "rotary_base": config["rope_theta"],
        "use_rope_scaling": scaling is not None,
        "rope_scaling_factor": scaling and scaling["factor"],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "vocab_size": config["vocab_size"],
    }


def parameters(architecture: ModelArchitecture) -> int:
    """Weights of the architecture, counted by hand."""
    model = architecture
    queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    attention = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
    attention += (queries + 2 * keys) * model.add_qkv_bias + 2 * model.kv_channels * model.qk_layernorm
    feed_forward = 3 * model.hidden_size * model.ffn_hidden_size
    if model.mixture is not None:
        expert = 3 * model.hidden_size * model.mixture.moe_ffn_hidden_size
        feed_forward = model.mixture.num_experts * (expert + model.hidden_size)
    layer = attention + feed_forward + 2 * model.hidden_size
    embeddings = model.vocab_size * model.hidden_size * (1 + model.untie_embeddings_and_output_weights)
    return model.num_layers * layer + embeddings + model.hidden_size


@EVERY_ROW
def test_every_flag_is_the_published_value(row):
    model, given = parsed(row)
    expected = expected_options(row["config"])
    assert {name: getattr(model, name) for name in expected} == expected
    # a switch that is off and an option without a value are left out, everything else is said
    assert given == {name for name, value in expected.items() if value not in (False, None)}


@EVERY_ROW
def test_the_flags_agree_with_the_checkpoint_in_the_start_up_check(row):
    model, given = parsed(row)
    assert disagreements(given, model, architecture_from_hf(row["config"])) == []


@EVERY_ROW
def test_the_fixture_gives_the_published_number_of_parameters(row):
    """Guards the fixture itself: a mistyped size changes the count that the model's card states."""
    count = parameters(architecture_from_hf(row["config"])) / 1e9
    assert count == pytest.approx(row["parameters_billion"], rel=0.015)
    assert len(row["sources"]) >= 2


def test_every_script_has_a_row_and_every_row_a_script():
    assert {path.name for path in SCRIPTS.iterdir()} == {row["script"] for row in ROWS}


def test_an_override_is_needed_where_the_variants_differ():
    row = next(row for row in ROWS if row["environment"])
    model, given = parsed(row | {"environment": {}})
    assert disagreements(given, model, architecture_from_hf(row["config"]))
