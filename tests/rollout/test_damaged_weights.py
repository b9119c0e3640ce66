"""Weights that give no probabilities: whose they are decides whether the student may be saved."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from opd_megatron.config.errors import RunError
from opd_megatron.rollout.engine import BrokenWeightsError, GenerateRequest, SamplingParams
from opd_megatron.rollout.local import LocalEngine
from opd_megatron.rollout.sglang_answer import read_response
from opd_megatron.rollout.teacher_voice import TeacherVoice
from opd_megatron.sample import Sample
from tests.rollout.models import VOCAB_SIZE

PROMPT = np.array([3, 4])
SAMPLING = SamplingParams(max_new_tokens=2)


@pytest.fixture
def damaged(qwen3: Any, tokenizer: Any) -> LocalEngine:
    """Weights that are finite, and products that are not."""
    weights = dict(qwen3.state_dict())
    name = "model.layers.0.mlp.down_proj.weight"
    engine = LocalEngine(qwen3.config, tokenizer)
    engine.update_weights((weights | {name: weights[name] * 1e38}).items(), "damaged")
    return engine


def test_the_student_s_server_that_met_nan_speaks_of_its_weights() -> None:
    meta = {
        "finish_reason": {"type": "stop", "matched": "NaN happened"},
        "output_token_logprobs": [[None, 0, None]],
    }
    with pytest.raises(BrokenWeightsError, match="server: the model's logits are NaN"):
        read_response({"output_ids": [0], "meta_info": meta}, limit=4, vocab_size=10, server="server")


def test_a_teacher_s_damaged_weights_are_no_word_against_the_student(damaged: LocalEngine, tokenizer: Any) -> None:
    with pytest.raises(BrokenWeightsError, match=r"^the model's log-probabilities are NaN"):
        damaged.generate([GenerateRequest(PROMPT, SAMPLING, (1,))])
    voice = TeacherVoice(damaged, tokenizer, positions=64, vocab_size=VOCAB_SIZE)

    async def speak() -> None:
        async for _ in voice.stream([Sample(0, 0, "", prompt_tokens=PROMPT)], SAMPLING, (1,)):
            pass

    with pytest.raises(RunError, match="the teacher that answers in the student's place has damaged weights") as caught:
        asyncio.run(speak())
    assert not isinstance(caught.value, BrokenWeightsError), "after which nothing is saved"
