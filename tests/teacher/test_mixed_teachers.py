"""Several teachers that score every sample and speak as one."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from opd_megatron.objectives.targets import TARGETS
from opd_megatron.questions import LogProbs, Question
from opd_megatron.sample import Sample
from opd_megatron.teacher.megatron import MegatronTeacher
from opd_megatron.teacher.mixture import MixedMegatronTeachers, MixedServers
from opd_megatron.teacher.protocol import FailureKind, TeacherError, TeacherFailure
from opd_megatron.teacher.sglang import SGLangTeacher
from tests.teacher.scripted_server import Handler, ScriptedServer, drop, reply

WEIGHTS = (0.25, 0.75)
LEFT, RIGHT = math.log(0.2), math.log(0.6)


def combine(log_probs: Sequence[np.ndarray]) -> np.ndarray:
    return TARGETS["arithmetic"](log_probs, WEIGHTS).float().numpy()


def sample(length: int = 3) -> Sample:
    return Sample(0, 0, "", prompt_tokens=np.array([1, 2]), response_tokens=np.full(length, 4))


class Trainer:
    """Every token has one log-probability, which depends on the model."""

    def __init__(self) -> None:
        self.kept: dict[str, bool] = {}

    def ask(self, question: Question, samples: Sequence[Sample]) -> list[np.ndarray]:
        assert isinstance(question, LogProbs)
        self.kept[question.model] = question.keep_hidden
        value = {"teacher": LEFT, "teacher_2": RIGHT}[question.model]
        return [np.full(sample.response_length, value, dtype=np.float32) for sample in samples]


def test_frozen_models_are_scored_in_turn_and_mixed() -> None:
    trainer = Trainer()
    members = [
        MegatronTeacher(trainer, "a", temperature=0.8, vocab_size=9),
        MegatronTeacher(trainer, "b", temperature=0.8, vocab_size=5, model="teacher_2"),
    ]
    mixed = MixedMegatronTeachers(trainer, members, combine, temperature=0.8)
    mixed.keep_hidden = True
    (scores,) = mixed.score([sample()])
    np.testing.assert_allclose(scores.log_probs_T, math.log(0.25 * 0.2 + 0.75 * 0.6), rtol=1e-6)
    assert (scores.temperature, scores.teacher) == (0.8, "a + b")
    assert trainer.kept == {"teacher": True, "teacher_2": True}
    with pytest.raises(TeacherError, match="teacher b does not know token 6"):
        mixed.score([Sample(0, 0, "", prompt_tokens=np.array([6]), response_tokens=np.array([1]))])


def answering(log_prob: float) -> Any:
    """A server that gives every token of a sample the same log-probability."""

    def step(handler: Handler) -> None:
        asked = json.loads(handler.body)
        ids, start = asked["input_ids"], asked["logprob_start_len"]
        entries = [[None, ids[start], None], *([log_prob, token, None] for token in ids[start + 1 :])]
        reply(200, {"text": "", "meta_info": {"input_token_logprobs": entries, "weight_version": "v1"}})(handler)

    return step


def ask(mixed: MixedServers, *samples: Sample) -> Any:
    async def score() -> Any:
        try:
            return await asyncio.gather(*map(mixed.score_one, samples), return_exceptions=True)
        finally:
            await mixed.aclose()

    return asyncio.run(score())


def test_servers_are_all_asked_and_one_that_fails_leaves_no_score() -> None:
    servers = [ScriptedServer(answering(LEFT)), ScriptedServer(answering(RIGHT)), ScriptedServer(drop)]
    try:
        left, right, broken = (
            SGLangTeacher(server.url, name=name, vocab_size=10, max_retries=0)
            for name, server in zip(("left", "right", "broken"), servers, strict=True)
        )
        (scores,) = ask(MixedServers({"left": left, "right": right}, combine), sample())
        np.testing.assert_allclose(scores.log_probs_T, math.log(0.25 * 0.2 + 0.75 * 0.6), rtol=1e-6)
        assert scores.valid_T.all()
        assert (scores.teacher, scores.weight_version) == ("left + right", "v1,v1")
        (failure,) = ask(MixedServers({"left": left, "broken": broken}, combine), sample())
        assert isinstance(failure, TeacherFailure)
        assert failure.kind == FailureKind.CONNECTION
    finally:
        for server in servers:
            server.close()


def test_what_one_server_cannot_score_is_not_sent_to_any() -> None:
    teachers = {
        name: SGLangTeacher("http://127.0.0.1:9", name=name, vocab_size=size, max_retries=0)
        for name, size in (("large", 10), ("small", 3))
    }
    mixed = MixedServers(teachers, combine)
    with pytest.raises(TeacherFailure, match="small"):
        mixed.score([sample()])
    assert mixed.statistics()["requests"] == 0
