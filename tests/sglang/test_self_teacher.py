"""Self-distillation through real servers: privileged prompts, and weights that change under the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_megatron.data.column_arithmetic import sample_problems
from opd_megatron.sample import Sample, read_samples
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.e2e.support import run_training
from tests.sglang.conftest import Served
from tests.sglang.speakers import Speaker

pytestmark = pytest.mark.sglang


def behind_the_context(sample: Sample) -> np.ndarray:
    assert sample.teacher_prompt_tokens is not None
    return np.concatenate([sample.teacher_prompt_tokens, sample.response_tokens])


def test_a_server_scores_the_response_behind_the_privileged_prompt(qwen: Served) -> None:
    """Against transformers, with prompts that are longer, shorter and one token apart."""
    random, samples = np.random.default_rng(8), []
    for index, (own, seen) in enumerate([(5, 19), (12, 3), (4, 5), (5, 4), (1, 1)]):
        sample = qwen.random_sample(random, own, 9, index)
        sample.teacher_prompt_tokens = random.integers(qwen.vocab_size, size=seen)
        samples.append(sample)
    teacher = SGLangTeacher(qwen.server.url, vocab_size=qwen.vocab_size, top_k=3)
    for sample, scores in zip(samples, teacher.score(samples), strict=True):
        expected = qwen.log_probs(behind_the_context(sample))[-9:]
        np.testing.assert_allclose(scores.log_probs_T, expected, atol=1e-4)
        assert np.abs(qwen.log_probs(sample.tokens)[-9:] - expected).max() > 1e-2
        assert scores.top_ids_TK is not None
        assert scores.top_ids_TK.shape == (9, 3)


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("solved") / "prompts.jsonl"
    rows = [{"prompt": p.prompt(), "label": p.answer()} for p in sample_problems(40, 3, held_out=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("feedback", [False, True])
def test_the_engine_that_samples_teaches_with_the_weights_of_each_rollout(
    speaker: Speaker, spoken: str, solved: Path, tmp_path: Path, feedback: bool
) -> None:
    """Three steps at a rate that moves the weights; the scores are those of the saved weights, not of the first."""
    told: dict[str, Any] = {
        "rm_type": None,
        "custom_rm_path": "tests.e2e.rewards:tell_the_answer",
        "opd_self_feedback": True,
        "opd_self_context_key": "told",
    }
    own: dict[str, Any] = {
        "use_opd": True,
        "opd_type": "sglang",
        "opd_teacher": "self",
        "opd_self_weights": "current",
        "opd_self_context_key": "label",
        "opd_self_template": "{context};{prompt}",
        "advantage_estimator": "none",
        "rollout_engine": "sglang",
        "rollout_engine_url": spoken,
        "save_hf": tmp_path / "hf_{rollout_id}",
        "save_interval": 1,
        "lr": 1e-2,
        "save_debug_rollout_data": tmp_path / "recorded_{rollout_id}.jsonl",
        **(told if feedback else {}),
    }
    metrics = run_training(speaker.folder, solved, tmp_path / "run", **own)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(line["train/grad_norm"] > 0 and line["opd/teacher_failed_frac"] == 0 for line in metrics)
    first = AutoModelForCausalLM.from_pretrained(speaker.folder, dtype=torch.float32).eval()
    for rollout_id in range(3):
        folder = tmp_path / f"hf_{rollout_id}" if rollout_id else speaker.folder
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        gaps = []
        for sample in read_samples(tmp_path / f"recorded_{rollout_id}.jsonl"):
            assert sample.teacher_scores is not None
            if feedback and sample.reward:
                assert not sample.teacher_scores.valid_T.any()
                continue
            tokens = torch.as_tensor(behind_the_context(sample))[None]
            for said in (model, first):
                with torch.no_grad():
                    log_TV = said(tokens).logits[0].double().log_softmax(-1)
                log_T = log_TV[:-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()[-sample.response_length :]
                gaps.append(np.abs(log_T - sample.teacher_scores.log_probs_T).max())
        assert max(gaps[::2]) < 1e-3
        assert rollout_id == 0 or max(gaps[1::2]) > 1e-2
