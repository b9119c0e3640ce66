"""Inputs that the tests of the options share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.config.inputs import write_hf, write_torch_dist


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Inputs of all kinds, good and bad, by the name that stands for them in the tests' command lines."""
    root = tmp_path_factory.mktemp("inputs")
    named = {
        "root": root,
        "hf": write_hf(root / "student"),
        "config_only": write_hf(root / "config_only", weights=False),
        "llama": write_hf(root / "llama", model_type="llama", hidden_act="gelu"),
        "teacher": write_torch_dist(root / "teacher", num_hidden_layers=6, num_key_value_heads=4),
        "teacher_hf": write_hf(root / "teacher_hf", num_hidden_layers=6),
        "three_layers": write_hf(root / "three_layers", num_hidden_layers=3),
        "checkpoint": write_torch_dist(root / "checkpoint"),
        "release": write_torch_dist(root / "release", steps=("release",)),
        "torn": write_torch_dist(root / "torn", steps=(5,)),
        "empty": root / "empty",
        "no_tokenizer": write_hf(root / "no_tokenizer"),
        "torn_hf": write_hf(root / "torn_hf"),
        "bin": write_hf(root / "bin", weights=False),
        "no_config": write_torch_dist(root / "no_config"),
        "other": write_torch_dist(root / "other", steps=(1,), hidden_size=64, vocab_size=101),
        "file": root / "file",
        "prompts": root / "prompts.jsonl",
        "empty_prompts": root / "empty.jsonl",
        "bad_prompts": root / "bad.jsonl",
        "unlabelled": root / "unlabelled.jsonl",
        "routed": root / "routed.jsonl",
        "teachers": root / "teachers.yaml",
        "recorded": root / "rollout_0.jsonl",
    }
    (named["torn"] / "iter_0000005" / "__0_0.distcp").write_bytes(bytes(63))
    named["empty"].mkdir()
    (named["no_tokenizer"] / "tokenizer.json").unlink()
    (named["torn_hf"] / "model.safetensors").write_bytes((named["hf"] / "model.safetensors").read_bytes()[:-1])
    (named["bin"] / "pytorch_model.bin").write_bytes(b"x")
    (named["no_config"] / "hf" / "config.json").unlink()
    named["file"].write_text("text")
    named["prompts"].write_text('{"prompt": "1+1=", "label": "2"}\n' * 4)
    named["empty_prompts"].write_text("")
    named["bad_prompts"].write_text('{"prompt": "1+1=", "label": "2"}\n{"prompt": 3, "label": "2"}\n{"prom": "x"}\n')
    named["unlabelled"].write_text('{"prompt": "1+1="}\n')
    routes = ({"teacher": "math"}, {}, {"teacher": "maths"}, {"teacher": ["math"]})
    rows = [{"prompt": "1+1=", "label": "2", "metadata": metadata} for metadata in routes]
    named["routed"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    named["teachers"].write_text("{math: {urls: 'http://h:1'}, code: {urls: 'http://h:2'}}")
    named["recorded"].write_text("{}\n")
    return named
