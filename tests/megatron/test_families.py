"""Each family's forward pass against transformers, in one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_megatron.megatron.model import scale_frequencies
from opd_megatron.sample import Sample
from tests.megatron.support import (
    FAMILIES,
    ORIGINAL_CONTEXT,
    VOCAB_SIZE,
    architecture_of,
    load_reference,
    logits,
    make_samples,
    make_trainer,
    reference_logits,
    relative_error,
    save_reference,
    tiny_config,
)


def _long_sample(length: int = 5 * ORIGINAL_CONTEXT) -> Sample:
    tokens = np.random.default_rng(7).integers(0, VOCAB_SIZE, length)
    return Sample(index=0, group_index=0, prompt="", prompt_tokens=tokens[:1], response_tokens=tokens[1:])


def _error(folder: Path, samples: list[Sample], trainer: Any = None) -> float:
    """Largest relative error of the logits of any sample."""
    model = load_reference(folder)
    found = logits(trainer or make_trainer(folder), samples)
    with torch.no_grad():
        return max(
            relative_error(torch.from_numpy(found[place]), reference_logits(model, sample))
            for place, sample in enumerate(samples)
            if sample.response_length
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    folder = save_reference(tmp_path / "model", tiny_config(family, tie_word_embeddings=tied), seed=3)
    assert _error(folder, make_samples(0)) <= 1e-5


@pytest.mark.parametrize(
    "overrides",
    [
        {"head_dim": 24},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"vocab_size": 128},
        {"rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_shapes_and_settings_of_the_config_are_followed(tmp_path: Path, overrides: dict[str, Any]) -> None:
    folder = save_reference(tmp_path / "model", tiny_config("qwen3", **overrides))
    assert _error(folder, make_samples(1)) <= 1e-5


def test_scaled_rope_agrees_beyond_the_original_context(folders: dict[str, Path]) -> None:
    assert _error(folders["llama"], [_long_sample()]) <= 1e-5


@pytest.mark.parametrize("wrong", [{"original_max_position_embeddings": 8192}, {"factor": 8.0}, None])
def test_another_rope_scaling_would_be_noticed(folders: dict[str, Path], wrong: dict[str, Any] | None) -> None:
    """The comparison above is sharp: no scaling, or one of other constants, gives other logits."""
    trainer = make_trainer(folders["llama"])
    rotary = trainer.student.rotary_pos_emb
    plain = make_trainer(folders["llama"]).student.rotary_pos_emb
    scaling = architecture_of(folders["llama"]).rope_scaling
    assert scaling is not None
    dim = 2 * len(plain.inv_freq)
    unscaled = 1.0 / 500.0 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    rotary.inv_freq = unscaled if wrong is None else scale_frequencies(unscaled, dataclasses.replace(scaling, **wrong))
    type(rotary).forward.cache_clear()
    assert _error(folders["llama"], [_long_sample()], trainer) > 1e-3


def test_frequencies_equal_those_of_transformers(folders: dict[str, Path]) -> None:
    found = make_trainer(folders["llama"]).student.rotary_pos_emb.inv_freq
    torch.testing.assert_close(found, load_reference(folders["llama"]).model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
